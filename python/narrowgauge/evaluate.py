"""What a model is worth: perplexity, greedy generation and the time of a decoded token.

All functions run the model as it stands (its dtype, its narrow layers) under torch.inference_mode, one sequence at a
time. Timings interleave the models, run by run, so that a disturbance of the machine falls on all of them alike; what
is compared is always the same loop over the same key-value cache. Training and batching are not here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of `tokens` scored tokens, and the seconds that it took."""

    value: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class DecodeTime:
    """Seconds per decoded token over all runs: the median and the 10th percentile."""

    median: float
    p10: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return 1.0 / self.median


def cut_windows(tokenizer: Any, text: str, window: int = 512, count: int | None = None) -> torch.Tensor:
    """The first `count` (None: all) windows of the text's tokens, int64 [count, window]; no BOS, no overlap.

    ValueError if the text gives fewer than `count` windows, or none.
    """
    if window < 2:
        raise ValueError(f"window is {window}, expected at least 2 tokens")
    wanted = count or 1
    characters = len(text) if count is None else 16 * count * window  # more than any tokenizer needs
    ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
    have = len(ids) // window
    if have < wanted:
        raise ValueError(
            f"the text has {len(ids)} tokens, which make {have} windows of {window}; expected at least {wanted}: "
            "give a longer text or a smaller window"
        )
    have = min(have, count or have)
    return torch.tensor(ids[: have * window], dtype=torch.int64).view(have, window)


@torch.inference_mode()
def perplexity(model: Any, windows: torch.Tensor, progress: Callable[[int], None] | None = None) -> Perplexity:
    """Perplexity over windows, int64 [count, window]; the first token of each window is not scored.

    progress is called with the number of windows done. Log-likelihoods are summed in fp32 per window.
    """
    start = time.perf_counter()
    total = 0.0
    for done, window in enumerate(windows, 1):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        if progress is not None:
            progress(done)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = total / tokens
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, tokens, time.perf_counter() - start)


@torch.inference_mode()
def generate(
    model: Any, prompt: torch.Tensor, max_tokens: int, *, temperature: float = 0.0, seed: int | None = None
) -> Iterator[int]:
    """Yields the tokens that follow the prompt, int64 [tokens], until an end token (not yielded) or max_tokens.

    temperature 0 takes the likeliest token; above 0 samples, from torch's default generator seeded with `seed` if
    that is given.
    """
    ends = _end_tokens(model)
    if seed is not None:
        torch.manual_seed(seed)
    cache, logits = _prefill(model, prompt)
    for step in range(max_tokens):
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1))
        else:
            token = int(logits.argmax())
        if token in ends:
            return
        yield token
        if step + 1 < max_tokens:
            logits = _decode(model, cache, torch.tensor([[token]]))


def time_decode(
    models: Mapping[Name, Any], prompt: torch.Tensor, *, tokens: int = 12, rounds: int = 4
) -> dict[Name, DecodeTime]:
    """The time of one greedy decode step of each model after the same prompt, int64 [tokens].

    Each model decodes `tokens` tokens, then the next model does, `rounds` times over; before each of these runs one
    more token is decoded untimed, and after it the cache is cut back to the prompt.
    """
    if tokens < 1 or rounds < 1:
        raise ValueError(f"tokens is {tokens} and rounds is {rounds}, expected at least 1 of each")
    seconds: dict[Name, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        starts = {name: _prefill(model, prompt) for name, model in models.items()}
        for _ in range(rounds):
            for name, model in models.items():
                cache, logits = starts[name]
                for step in range(tokens + 1):
                    token = logits.argmax().view(1, 1)
                    begin = time.perf_counter()
                    logits = _decode(model, cache, token)
                    if step > 0:
                        seconds[name].append(time.perf_counter() - begin)
                cache.crop(-(tokens + 1))
    return {name: _summary(times) for name, times in seconds.items()}


def _summary(times: list[float]) -> DecodeTime:
    ordered = sorted(times)
    return DecodeTime(ordered[len(ordered) // 2], ordered[len(ordered) // 10], len(ordered))


def _prefill(model: Any, prompt: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A key-value cache that holds the prompt, and the logits after it, [vocabulary]."""
    if prompt.ndim != 1 or len(prompt) == 0:
        raise ValueError(f"the prompt has shape {list(prompt.shape)}, expected [tokens] with at least one token")
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    output = model(prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache, output.logits[0, -1]


def _decode(model: Any, cache: Any, token: torch.Tensor) -> torch.Tensor:
    """The logits, [vocabulary], after one more token, int64 [1, 1]."""
    logits: torch.Tensor = model(token, past_key_values=cache, use_cache=True).logits[0, -1]
    return logits


def _end_tokens(model: Any) -> set[int]:
    ends = model.config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}
