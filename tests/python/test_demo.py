"""The demo on a tiny model: every row, the round trip and the picture."""

from __future__ import annotations

import json
import platform

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")

import tiny_llama  # noqa: E402
from narrowgauge import demo  # noqa: E402


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    path = tiny_llama.write_gguf(folder / "tiny.gguf", tiny_llama.model())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "WINDOW", 32)
        patch.setattr(demo, "WINDOWS", 2)
        steps = []
        result = demo.run(path, tiny_llama.TEXT, "a text", save=folder / "saved", progress=steps.append)
    assert len(steps) == 12
    return result


def test_rows(result):
    names = [row.name for row in result.rows]
    assert names == ["torch fp32", "torch bf16", "fp8", "fp6", "fp5", "fp4", "int8", "int4", "fp6 + head"]
    rows = dict(zip(names, result.rows, strict=True))
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 112)
    assert result.layers == 14
    assert rows["torch fp32"].bytes == 4 * weights and rows["torch bf16"].bytes == 2 * weights
    assert {row.bytes_bf16 for row in result.rows[:-1]} == {2 * weights}
    assert rows["fp6 + head"].bytes_bf16 == 2 * weights + 2 * 64 * len(tiny_llama.TOKENS)
    # Codes of 8 bits and an fp32 scale per row.
    assert rows["int8"].bytes == weights + 4 * 2 * (64 + 32 + 32 + 64 + 112 + 112 + 64)
    assert rows["fp4"].bytes < rows["fp5"].bytes < rows["fp6"].bytes < rows["fp8"].bytes < rows["torch bf16"].bytes
    assert abs(result.loss(rows["int8"])) < abs(result.loss(rows["int4"])) + 1e-3
    assert result.loss(rows["torch fp32"]) == 0
    assert max(result.speedup(row) for row in result.rows if not row.narrow) == 1
    assert all(row.tokens_per_second_p10 >= row.tokens_per_second > 0 for row in result.rows)


def test_words_and_json(result):
    for row in result.rows:
        assert row.name in result.sentence(row) and result.sentence(row).endswith(".")
    value = json.loads(json.dumps(result.as_dict()))
    assert {"loss", "speedup", "sentence", "perplexity", "bytes"} <= set(value["rows"][0])


def test_saved_model_generates_the_same(result):
    assert result.saved.same_text and result.saved.format == "fp6"
    assert result.saved.bytes > 0 and result.saved.folder.endswith("saved")


def test_plot(result, tmp_path):
    demo.plot(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_default_text():
    text, name = demo.default_text()
    assert len(text) > 100_000 and platform.python_version() in name
