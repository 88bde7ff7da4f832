"""Whole models: what is swapped, what stays, ties, files, and every way in which a file can fail to fit."""

import gc
import json
import weakref
from pathlib import Path

import narrowgauge as ng
import pytest
import safetensors.torch
import torch
import transformers


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config(tied)).to(dtype).eval()


def config(tied: bool = True) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


IDS = torch.tensor([[1, 5, 9, 77, 159]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 128)
        self.norm = torch.nn.BatchNorm1d(128)
        self.last = torch.nn.Linear(128, 32, bias=False)
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.first(x)))) * self.table[1]


def test_swaps_in_place_and_reports() -> None:
    model, x = Small().eval(), torch.randn(3, 64)
    bias, expected = model.first.bias, model(x)
    seen = []
    report = ng.quantize_model(model, ng.fp6, progress=lambda done, total: seen.append((done, total)))
    assert isinstance(model.first, ng.nn.Linear) and isinstance(model.last, ng.nn.Linear)
    assert model.first.bias is bias and not model.first.training
    assert (model(x) - expected).norm() / expected.norm() < 0.1
    assert seen == [(1, 2), (2, 2)]
    assert [row.layer for row in report.rows] == ["first", "last"]
    row = report.rows[0]
    assert row.shape == (128, 64) and row.format == ng.fp6 and row.bytes_before == 128 * 64 * 4
    assert row.bytes_after == model.first.weight.nbytes and 28 < row.sqnr_db < 35
    assert report.bytes_after == sum(each.bytes_after for each in report.rows)
    kept = [bias, *model.norm.parameters(), *model.norm.buffers(), model.table]
    assert report.bytes_kept == sum(each.numel() * each.element_size() for each in kept)
    text = str(report)
    assert "first" in text and "fp6_e2m3:g128:fp16" in text and "2 layers" in text and "SQNR dB" in text


def test_sqnr_is_that_of_the_weights() -> None:
    model = Small()
    w = model.first.weight.detach().clone()
    report = ng.quantize_model(model, ng.int4)
    error = (w - model.first.weight.dequantize()).double()
    assert report.rows[0].sqnr_db == pytest.approx(
        float(10 * torch.log10(w.double().square().sum() / error.square().sum()))
    )


def test_search_is_no_worse() -> None:
    a, b = ng.quantize_model(llama(), ng.int4), ng.quantize_model(llama(), ng.int4, search="mse")
    assert b.sqnr_db >= a.sqnr_db
    assert all(y.sqnr_db >= x.sqnr_db for x, y in zip(a.rows, b.rows, strict=True))


def test_patterns_and_skips() -> None:
    model = llama()
    patterns = {"down_proj": ng.int8, "model.layers.0.*": "fp8", "*": ng.fp4}
    report = ng.quantize_model(model, patterns, skip=["model.layers.1.self_attn.?_proj"])
    formats = {row.layer: row.format for row in report.rows}
    assert formats["model.layers.0.mlp.down_proj"] == ng.int8 and formats["model.layers.0.mlp.up_proj"] == ng.fp8
    assert formats["model.layers.1.mlp.up_proj"] == ng.fp4 and len(formats) == 10
    assert type(model.model.layers[1].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("format", "skip", "message"),
    [
        ({"up_projection": "fp6"}, None, "pattern 'up_projection' matches no Linear layer; there are .*q_proj"),
        ("fp6", ["nothing"], "skip entry 'nothing' matches no Linear layer"),
        ("fp66", None, "fp66"),
    ],
)
def test_bad_patterns(format: object, skip: list[str] | None, message: str) -> None:
    model = llama()
    with pytest.raises(ValueError, match=message):
        ng.quantize_model(model, format, skip=skip)
    assert not any(isinstance(module, ng.nn.Linear) for module in model.modules())


def test_models_that_cannot_be_narrowed() -> None:
    with pytest.raises(ValueError, match="a Sequential, has no torch.nn.Linear layers"):
        ng.quantize_model(torch.nn.Sequential(torch.nn.ReLU()), ng.fp6)
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' holds NaN"):
        ng.quantize_model(model, ng.fp6)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear  # nothing was changed
    with torch.device("meta"):
        empty = Small()
    with pytest.raises(ValueError, match="'first' is on device meta"):
        ng.quantize_model(empty, ng.fp6)


def test_tied_head_stays_unless_named() -> None:
    for tied in (True, False):
        model = llama(tied)
        report = ng.quantize_model(model, ng.fp6)
        assert type(model.lm_head) is torch.nn.Linear and len(report.rows) == 14
    model = llama(tied=True)
    ng.quantize_model(model, ng.fp6, skip=[])
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
    model = llama(tied=False)
    ng.quantize_model(model, ng.fp6, skip=[])
    assert isinstance(model.lm_head, ng.nn.Linear) and type(model.model.embed_tokens) is torch.nn.Embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_named_tied_head_shares_with_the_embedding(dtype: torch.dtype) -> None:
    model = llama(dtype=dtype)
    expected = logits(model).float()
    report = ng.quantize_model(model, {"lm_head": ng.int8, "*": ng.int8})
    assert len(report.rows) == 15 and report.rows[-1].layer == "lm_head"
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(embedding, ng.nn.Embedding) and embedding.packed is head.packed and embedding.dtype == dtype
    y = logits(model)
    assert y.dtype == dtype and (y.float() - expected).norm() / expected.norm() < 0.05


def test_weights_shared_by_linear_layers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    model[1].weight = model[0].weight
    report = ng.quantize_model(model, ng.fp6)
    assert len(report.rows) == 1 and model[0].packed is model[1].packed
    assert model[0].bias is not model[1].bias


def test_memory_is_owned_once() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(576, 192) for _ in range(3)))
    old = [weakref.ref(module.weight) for module in model]
    alive = []
    report = ng.quantize_model(
        model, ng.fp6, progress=lambda done, total: alive.append(sum(w() is not None for w in old))
    )
    assert alive == [2, 1, 0]  # each is let go before the next is made
    gc.collect()
    blocks = {module.packed.data_ptr(): module.packed for module in model}
    resident = sum(block.untyped_storage().nbytes() for block in blocks.values())
    canonical = sum(module.weight.nbytes for module in model)
    assert resident == report.bytes_resident <= 1.02 * canonical
    assert all(module.weight._canonical is None for module in model)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(named: bool, meta: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype=dtype)
    ng.quantize_model(model, {"lm_head": ng.fp8, "*": ng.fp6} if named else ng.fp6)
    path = ng.save_model(model, tmp_path / "out")
    with torch.device("meta" if meta else "cpu"):
        other = transformers.LlamaForCausalLM(config()).eval()
    steps: list[tuple[int, int]] = []
    assert ng.load_model(tmp_path / "out", other, progress=lambda *step: steps.append(step)) is other
    assert torch.equal(logits(other), logits(model))
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)
    assert not any(each.device.type == "meta" for each in (*other.parameters(), *other.buffers()))
    head, embedding = other.lm_head, other.model.embed_tokens
    assert head.packed is embedding.packed if named else head.weight is embedding.weight
    assert {p.dtype for p in other.parameters()} == {dtype}
    tensors = safetensors.torch.load_file(path)
    assert "lm_head.weight" not in tensors and "model.layers.0.mlp.up_proj.weight.codes" in tensors
    again = ng.save_model(other, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()
    with torch.inference_mode():
        assert torch.equal(
            other.generate(IDS, max_new_tokens=4, do_sample=False),
            model.generate(IDS, max_new_tokens=4, do_sample=False),
        )


def test_load_replaces_narrow_layers_and_keeps_objects(tmp_path: Path) -> None:
    a, b = Small().eval(), Small().eval()
    ng.quantize_model(a, ng.fp6)
    ng.quantize_model(b, ng.int4)
    ng.save_model(a, tmp_path)
    weight = b.norm.weight
    ng.load_model(tmp_path, b)
    x = torch.randn(3, 64)
    assert torch.equal(a(x), b(x)) and b.norm.weight is weight and b.first.format == ng.fp6


def test_plain_models_and_odd_tensors(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.register_buffer("scalar", torch.tensor(3, dtype=torch.int64))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("none", torch.zeros(0, 4, dtype=torch.float16))
    model.register_buffer("strided", torch.arange(12.0).reshape(3, 4).T)
    model.register_buffer("fp8", torch.ones(3).to(torch.float8_e4m3fn))
    ng.save_model(model, tmp_path)
    with torch.device("meta"):
        other = torch.nn.Module()
        for name, buffer in model.named_buffers():
            other.register_buffer(name, torch.empty_like(buffer, device="meta"))
    ng.load_model(tmp_path, other)
    for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.float(), b.float()), name


def rewrite(path: Path, change: object, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the file again with its narrowgauge entry changed."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["narrowgauge"])
    change(content)
    metadata["narrowgauge"] = json.dumps(content)
    safetensors.torch.save_file({**held, **(tensors or {})}, path, metadata)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = Small()
    ng.quantize_model(model, ng.fp6)
    path = ng.save_model(model, tmp_path)
    good = path.read_bytes()

    def fails(message: str, target: torch.nn.Module, kind: type[Exception] = ValueError) -> None:
        state = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        with pytest.raises(kind, match=message):
            ng.load_model(tmp_path, target)
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor, state[name]), "the model was changed"

    def fresh(change: object, tensors: dict[str, torch.Tensor] | None = None) -> None:
        path.write_bytes(good)
        rewrite(path, change, tensors)

    other = Small()
    other.first = torch.nn.Linear(65, 128)
    fails(r"'first.weight' is \[128, 64\] in .*, but \[128, 65\] here", other)
    other = Small()
    del other.last
    fails("holds 'last.weight', but the model has no such layer", other)
    other = Small()
    other.last = torch.nn.Conv1d(128, 32, 1)
    fails("'last.weight' is narrow in .*, but the layer is a Conv1d", other)
    other = Small()
    other.extra = torch.nn.Linear(2, 2)
    fails("lacks 'extra.weight', 'extra.bias', which the model has", other)
    other = Small()
    other.first.bias = None
    fails("holds 'first.bias', but the model has no such tensor", other)
    other = Small()
    other.norm = torch.nn.BatchNorm1d(127)
    fails(r"'norm.weight' is \[128\] in .*, but \[127\] here", other)
    fresh(lambda content: content["tensors"]["last.weight"].update(format="fp6_e2m4"))
    fails("fp6_e2m4", Small())
    fresh(lambda content: content["tensors"]["last.weight"].update(format="fp6_e2m3:g64:fp16"))
    fails("'last.weight.scales' is", Small(), ng.FileCorrupt)
    fresh(lambda content: content.update(version=99))
    fails("version 99", Small())
    fresh(lambda content: content.update(tensors=[1]))
    fails("not sound", Small(), ng.FileCorrupt)
    fresh(lambda content: content["tensors"]["last.weight"].update(shape=[-1, 4]))
    fails("not sound", Small(), ng.FileCorrupt)
    fresh(lambda content: content.update(tied={"first.scale": "first.bias"}))
    fails("ties 'first.scale'", Small())
    fresh(lambda content: None, {"stray": torch.zeros(2)})
    fails("holds 'stray'", Small())
    path.write_bytes(good[: len(good) // 2])
    fails("bytes|truncated|size", Small(), ng.FileCorrupt)
    path.unlink()
    fails("model.safetensors", Small(), FileNotFoundError)


def test_activations_are_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    with pytest.raises(ValueError, match="activations are int8, but the elements of nf4"):
        ng.quantize_model(model, {"0": "fp6", "1": "nf4"}, activations="int8")
    assert type(model[0]) is torch.nn.Linear  # nothing was changed
    ng.quantize_model(model, "fp6", activations="int8")
    model[1].activations = "exact"
    path = ng.save_model(model, tmp_path)
    with torch.device("meta"):
        fresh = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    ng.load_model(tmp_path, fresh)
    assert [layer.activations for layer in fresh] == ["int8", "exact"]
    x = torch.randn(3, 32)
    assert torch.equal(fresh(x), model(x))

    def spoil(content: dict) -> None:
        content["activations"]["0.weight"] = "int3"

    rewrite(path, spoil)
    with pytest.raises(ValueError, match="'0.weight': activations are 'int3'"):
        ng.load_model(tmp_path, fresh)


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    path = ng.save_model(model, tmp_path)
    before = path.read_bytes()
    model.to("meta")
    with pytest.raises(ValueError, match="on device meta"):
        ng.save_model(model, tmp_path)
    assert path.read_bytes() == before
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError):
        ng.save_model(Small(), blocked)
