"""`narrowgauge generate`: continue a prompt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowgauge.cli.output import JsonOption, Output
from narrowgauge.importers import load_causal_lm, require


def command(
    model: Annotated[Path, typer.Argument(help="A narrowgauge folder, a Hugging Face model folder or a GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 64,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token; above 0 samples.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of what is not narrow: float32 or bfloat16.")] = "float32",
    json: JsonOption = False,
) -> None:
    """Generate text from a prompt."""
    output = Output(json)
    torch = require("torch", "demo")
    loaded = load_causal_lm(model, parse_dtype(dtype))
    tokenizer = loaded.need_tokenizer()
    from narrowgauge.evaluate import generate

    if chat:
        prompt = chat_prompt(tokenizer, prompt)
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty; expected at least one token")
    output.stream(prompt if not chat else "")
    start = time.perf_counter()
    tokens: list[int] = []
    shown = ""
    for token in generate(loaded.model, torch.tensor(ids), max_tokens, temperature=temperature, seed=seed):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else the bytes of a character are still incomplete
            output.stream(text[len(shown) :])
            shown = text
    seconds = time.perf_counter() - start
    text = tokenizer.decode(tokens)
    output.stream(text[len(shown) :] + "\n")
    output.note(f"{len(tokens)} tokens in {seconds:.2f} s, prompt of {len(ids)} tokens included; {loaded.source}")
    result: dict[str, Any] = {"model": str(model), "prompt": prompt, "text": text, "prompt_tokens": len(ids)}
    output.result({**result, "tokens": len(tokens), "seconds": seconds})


def chat_prompt(tokenizer: Any, text: str) -> str:
    """The text as a user's turn, up to where the model answers. ValueError if the model has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template: leave out --chat")
    turn = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def parse_dtype(name: str) -> Any:
    """'float32' or 'bfloat16' as a torch dtype."""
    if name not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"{name!r}; expected float32 or bfloat16", param_hint="--dtype")
    return getattr(require("torch", "demo"), name)
