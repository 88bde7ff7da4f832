"""A whole language model: decoding and prefill with narrow layers beside torch and llama.cpp, and what is not products.

    python bench/decode.py [--model MODEL] [--formats fp6 int8] [--rounds 8] [--prefill 512]

Every model decodes greedily after the same short prompt, one token at a time, in turns of --tokens tokens; before each
turn it takes --prefill other tokens in one pass, which is timed too. Rounds interleave the models in random order.
Linear layers are narrow, the head too where the row says so; all else is torch's, in the type of "rest". "the loop
alone" is transformers' and torch's work on a token without any product: its linear layers give zeros at once. What a
row takes above that is its products.

llama.cpp's rows (pip install llama-cpp-python, which compiles for many minutes) are of the same weights: the GGUF file,
quantized anew by llama.cpp, in a loop of its own in C++. It needs a model that is a GGUF file, such as the default.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import narrowgauge as ng
import numpy as np
import protocol
import torch
from narrowgauge.demo import PROMPT
from narrowgauge.importers import load_causal_lm, smollm2
from narrowgauge.importers.huggingface import cast_parameters
from transformers import DynamicCache

RESTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Contender(Protocol):
    def prefill(self, tokens: list[int]) -> int:
        """Forgets all, takes the tokens in one pass, and gives the likeliest next one."""

    def step(self, token: int) -> int:
        """The likeliest token after this one."""


class TorchModel:
    """One of transformers', on torch."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: Any = None

    def prefill(self, tokens: list[int]) -> int:
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(tokens)

    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, tokens: list[int]) -> int:
        ids = torch.tensor([tokens])
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path, context: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(
            str(path), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip

    def prefill(self, tokens: list[int]) -> int:
        self.llama.reset()
        return self._eval(tokens)

    def step(self, token: int) -> int:
        return self._eval([token])

    def _eval(self, tokens: list[int]) -> int:
        self.llama.eval(tokens)
        logits = self.llama._ctx.get_logits_ith(-1)
        return int(np.ctypeslib.as_array(logits, shape=(self.llama.n_vocab(),)).argmax())


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: object) -> None:
    """Where llama.cpp's words go."""


class _Zeros(torch.nn.Module):
    """A linear layer's output without the product."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.row = torch.zeros(1, 1, layer.out_features, dtype=layer.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.row.expand(*x.shape[:-1], -1)


def without_products(model: Any) -> Any:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, _Zeros(layer))
    return model


def contenders(path: Path, formats: list[str], activations: list[str]) -> dict[str, Contender]:
    models: dict[str, Contender] = {}
    for rest, dtype in RESTS.items():
        wide = cast_parameters(load_causal_lm(path, torch.float32).model, dtype)
        models[f"torch {rest}"] = TorchModel(wide)
        models[f"the loop alone, rest {rest}"] = TorchModel(without_products(copy.deepcopy(wide)))
        for name in formats:
            for each in activations:
                title = name if each == "exact" else f"{name} {each}"
                for head in (False, True):
                    model = load_causal_lm(path, torch.float32).model
                    ng.quantize_model(model, {"lm_head": name, "*": name} if head else name, activations=each)
                    key = f"{title}{' + head' if head else ''}, rest {rest}"
                    models[key] = TorchModel(cast_parameters(model, dtype))
    return models


def llama_cpp(path: Path, types: list[str], context: int, folder: Path) -> dict[str, Contender]:
    try:
        import llama_cpp
    except ImportError as missing:
        print(f"llama.cpp is absent: {missing}")
        return {}
    if path.suffix != ".gguf":
        print(f"llama.cpp is absent: it needs a GGUF file, got {path}")
        return {}
    llama_cpp.llama_log_set(_silent, None)
    models: dict[str, Contender] = {}
    for name in types:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        options.allow_requantize = True
        out = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(path).encode(), str(out).encode(), options) != 0:
            raise RuntimeError(f"llama.cpp could not quantize {path} to {name}")
        models[f"llama.cpp {name}"] = LlamaCpp(out, context)
    return models


def measure(
    models: dict[str, Contender], prompt: list[int], passage: list[int], tokens: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every decoded token and of every prefill, by model."""
    times: dict[str, dict[str, list[float]]] = {name: {"token": [], "prefill": []} for name in models}
    for number in range(-1, rounds):
        for name in random.sample(list(models), len(models)):
            model = models[name]
            prefill = _timed(lambda model=model: model.prefill(passage))
            token = model.prefill(prompt)
            steps = []
            for step in range(tokens + 1):
                start = time.perf_counter()
                token = model.step(token)
                if step > 0:
                    steps.append(time.perf_counter() - start)
            if number >= 0:
                times[name]["token"] += steps
                times[name]["prefill"].append(prefill)
    return times


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or model folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--formats", nargs="+", default=["fp6"])
    parser.add_argument("--activations", nargs="+", default=["exact", "int8"])
    parser.add_argument("--gguf", nargs="*", default=["Q8_0", "Q6_K"], help="llama.cpp's types")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the pass")
    parser.add_argument("--tokens", type=int, default=12, help="decoded in a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", help="write all figures here")
    args = parser.parse_args()
    protocol.run_pinned()
    torch.set_num_threads(protocol.usable_cores())
    ng._native.adopt_openmp()
    protocol.print_machine()

    path = args.model or smollm2.fetch()
    lm = load_causal_lm(path, torch.float32)
    prompt = lm.need_tokenizer()(PROMPT)["input_ids"]
    passage = torch.randint(0, lm.model.config.vocab_size, (args.prefill,)).tolist()
    print(f"model: {lm.source}")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        models = contenders(path, args.formats, args.activations)
        context = args.prefill + len(prompt) + args.tokens + 2
        models |= llama_cpp(path, args.gguf, context, Path(folder))
        times = measure(models, prompt, passage, args.tokens, args.rounds)

    results: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    medians = {name: {what: statistics.median(all_) for what, all_ in mine.items()} for name, mine in times.items()}
    best = {what: min(medians[f"torch {rest}"][what] for rest in RESTS) for what in ("token", "prefill")}
    best_p10 = min(protocol.percentile(times[f"torch {rest}"]["token"], 0.1) for rest in RESTS)
    for name, mine in times.items():
        p10 = protocol.percentile(mine["token"], 0.1)
        result = {
            "model": name, "token_ms": 1e3 * medians[name]["token"], "token_ms_p10": 1e3 * p10,
            "prefill_tokens_per_s": args.prefill / medians[name]["prefill"],
            "decode_speedup": best["token"] / medians[name]["token"],
            "decode_speedup_p10": best_p10 / p10,
            "prefill_speedup": best["prefill"] / medians[name]["prefill"],
            "prefill_x_bf16": medians["torch bf16"]["prefill"] / medians[name]["prefill"],
        }  # fmt: skip
        results.append(result)
        rows.append(
            [
                name,
                f"{1e3 * p10:.1f} / {result['token_ms']:.1f}",
                f"{1e3 / result['token_ms']:.1f}",
                f"{result['decode_speedup_p10']:.2f} / {result['decode_speedup']:.2f}",
                f"{result['prefill_tokens_per_s']:.0f}",
                f"{result['prefill_speedup']:.2f}",
                f"{result['prefill_x_bf16']:.2f}",
            ]
        )
    columns = ["model", "ms a token, p10 / median", "tokens/s", "x better torch, likewise"]
    columns += [f"prefill {args.prefill}, tokens/s", "x better torch", "x torch bf16"]
    protocol.print_table("decode and prefill", columns, rows)
    loop = min(medians[f"the loop alone, rest {rest}"]["token"] for rest in RESTS)
    print(
        f"\nOf the {1e3 * best['token']:.1f} ms that the better torch row takes for a token, {1e3 * loop:.1f} are the "
        f"Python loop and all that is not a product of a linear layer: without any products it would be "
        f"{best['token'] / loop:.2f}x as fast, and no row in this loop can be more."
    )
    if args.json:
        protocol.write_json(args.json, results)


if __name__ == "__main__":
    main()
