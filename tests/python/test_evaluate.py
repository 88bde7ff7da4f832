"""Perplexity, generation and decode timing against plain references."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

import tiny_llama  # noqa: E402
from narrowgauge import evaluate  # noqa: E402
from narrowgauge.importers import load_causal_lm  # noqa: E402

PROMPT = torch.tensor([7, 9, 11, 30, 2])


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = tiny_llama.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama.model())
    return load_causal_lm(path)


def test_cut_windows(lm):
    ids = lm.tokenizer(tiny_llama.TEXT)["input_ids"]
    windows = evaluate.cut_windows(lm.tokenizer, tiny_llama.TEXT, 32, 5)
    assert windows.shape == (5, 32) and windows.dtype is torch.int64
    assert windows.flatten().tolist() == ids[:160]
    assert len(evaluate.cut_windows(lm.tokenizer, tiny_llama.TEXT, 32)) == len(ids) // 32
    with pytest.raises(ValueError, match=r"windows of 32; expected at least 1000"):
        evaluate.cut_windows(lm.tokenizer, tiny_llama.TEXT, 32, 1000)
    with pytest.raises(ValueError, match="expected at least 1"):
        evaluate.cut_windows(lm.tokenizer, "short", 32)
    with pytest.raises(ValueError, match="expected at least 2 tokens"):
        evaluate.cut_windows(lm.tokenizer, tiny_llama.TEXT, 1)


def test_perplexity_is_the_definition(lm):
    windows = evaluate.cut_windows(lm.tokenizer, tiny_llama.TEXT, 32, 3)
    total = 0.0
    with torch.no_grad():
        for window in windows:
            scores = torch.log_softmax(lm.model(window[None]).logits[0].double(), -1)
            total -= sum(scores[i, window[i + 1]].item() for i in range(31))
    seen = []
    measured = evaluate.perplexity(lm.model, windows, seen.append)
    assert measured.value == pytest.approx(math.exp(total / 93), rel=1e-4)
    assert measured.tokens == 93 and seen == [1, 2, 3]


def test_generate_is_greedy(lm):
    lm.model.generation_config.pad_token_id = 0
    expected = lm.model.generate(PROMPT[None], max_new_tokens=12, do_sample=False)[0, len(PROMPT) :].tolist()
    if 0 in expected:  # the end token is not yielded
        expected = expected[: expected.index(0)]
    assert list(evaluate.generate(lm.model, PROMPT, 12)) == expected


def test_generate_stops_at_the_end_token(lm, monkeypatch):
    first = next(evaluate.generate(lm.model, PROMPT, 1))
    monkeypatch.setattr(lm.model.config, "eos_token_id", [first, 1])
    assert list(evaluate.generate(lm.model, PROMPT, 5)) == []


def test_generate_samples_by_seed(lm):
    runs = [list(evaluate.generate(lm.model, PROMPT, 8, temperature=5.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    with pytest.raises(ValueError, match="at least one token"):
        list(evaluate.generate(lm.model, torch.tensor([], dtype=torch.int64), 3))


def test_time_decode(lm):
    calls = []

    class Counted(torch.nn.Module):
        config = lm.model.config

        def forward(self, ids, past_key_values, **options):
            calls.append((ids.shape[1], past_key_values.get_seq_length()))
            return lm.model(ids, past_key_values=past_key_values, **options)

    times = evaluate.time_decode({"a": Counted(), "b": lm.model}, PROMPT, tokens=3, rounds=2)
    assert list(times) == ["a", "b"] and {each.tokens for each in times.values()} == {6}
    assert all(0 < each.p10 <= each.median for each in times.values())
    # One prompt, then twice the same four steps: the cache was cut back in between.
    assert calls == [(5, 0), *[(1, 5 + step) for step in range(4)] * 2]
    with pytest.raises(ValueError, match="expected at least 1"):
        evaluate.time_decode({}, PROMPT, tokens=0)
