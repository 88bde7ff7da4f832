"""Linear and Embedding as modules: state dicts, copies, pickles, dtype and sharing."""

import copy
import io
import pickle

import narrowgauge as ng
import pytest
import safetensors.torch
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def linear(format: object = ng.fp6, bias: bool = True) -> ng.nn.Linear:
    return ng.nn.Linear.from_linear(torch.nn.Linear(96, 48, bias=bias), format)


def test_linear() -> None:
    plain = torch.nn.Linear(96, 48)
    layer = ng.nn.Linear.from_linear(plain, ng.int8)
    x = torch.randn(2, 3, 96)
    assert torch.allclose(layer(x), plain(x), atol=0.05)
    assert layer.bias is plain.bias
    assert torch.equal(layer(x), ng.linear(x, layer.weight, layer.bias))
    assert layer.weight.is_packed and layer.format == ng.int8
    assert "in_features=96, out_features=48, bias=True, format=int8:row:fp32" in repr(layer)


def test_construction_is_checked() -> None:
    q = ng.quantize(torch.randn(48, 96), ng.fp6)
    with pytest.raises(ValueError, match=r"bias has shape \[47\], expected \[48\]"):
        ng.nn.Linear(q, torch.zeros(47))
    with pytest.raises(ValueError, match="expected two axes"):
        ng.nn.Linear(ng.quantize(torch.randn(2, 3, 16), ng.fp6))
    with pytest.raises(TypeError, match="ndarray"):
        ng.nn.Linear(ng.quantize(torch.randn(4, 16).numpy(), ng.fp6))


@pytest.mark.parametrize("format", ["fp6", "nvfp4", "uint4:g64:bf16", "int8"])
def test_state_dict(format: str) -> None:
    a, b = linear(format), linear(format)
    state = a.state_dict()
    assert "packed" not in state and {"weight.codes", "weight.scales", "weight.format", "bias"} <= set(state)
    block = b.packed
    assert b.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    x = torch.randn(2, 96)
    assert torch.equal(a(x), b(x)) and b.packed is block
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    c = linear(format)
    c.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(a(x), c(x))
    d = linear(format)
    d.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
    assert torch.equal(a(x), d(x))


def test_state_dict_inside_a_model() -> None:
    a, b = (torch.nn.Sequential(linear(), torch.nn.ReLU(), ng.nn.Embedding(linear().weight)) for _ in range(2))
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 96)
    assert torch.equal(a[0](x), b[0](x)) and torch.equal(a[2](torch.arange(48)), b[2](torch.arange(48)))


def test_wrong_state_dicts() -> None:
    layer = linear(ng.fp6)
    before = layer.weight.codes
    with pytest.raises(RuntimeError, match="weight has format fp6_e3m2:g128:fp16, expected fp6_e2m3:g128:fp16"):
        layer.load_state_dict(linear("fp6_e3m2:g128:fp16").state_dict())
    state = linear(ng.fp6).state_dict()
    missing = {key: value for key, value in state.items() if key != "weight.scales"}
    with pytest.raises(RuntimeError, match="Missing key.*weight.scales"):
        layer.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r"codes has shape \(48, 71\), expected \(48, 72\)"):
        layer.load_state_dict({**state, "weight.codes": state["weight.codes"][:, 1:]})
    assert torch.equal(layer.weight.codes, before)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**state, "weight": torch.zeros(48, 96)})


def test_copies_and_pickles() -> None:
    layer, x = linear(), torch.randn(2, 96)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.packed is not layer.packed
        assert list(other.state_dict()) == list(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


def test_sharing_survives_copies() -> None:
    q = ng.quantize(torch.randn(48, 96), ng.fp6)
    model = torch.nn.ModuleDict({"embed": ng.nn.Embedding(q), "head": ng.nn.Linear(q)})
    assert model["embed"].packed is model["head"].packed
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other["embed"].packed is other["head"].packed
        assert other["embed"].packed is not q.packed


def test_dtype_changes_leave_the_weights_alone() -> None:
    layer = linear()
    block = layer.packed
    layer.to(torch.bfloat16)
    assert layer.packed is block and layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.half().double().float()
    assert layer.packed.dtype == torch.uint8


def test_moved_memory_is_followed() -> None:
    layer, x = linear(), torch.randn(2, 96)
    y = layer(x)
    layer.share_memory()
    assert torch.equal(layer(x), y)
    layer._apply(lambda t: t.clone())  # as .to() to another device and back does
    assert torch.equal(layer(x), y)


def test_moves_to_a_gpu_pack_anew() -> None:
    """As far as a torch without CUDA shows it; what follows is in test_cuda_linear.py."""
    layer, embedding = linear(), ng.nn.Embedding(linear().weight)
    block = layer.packed

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True):
        if not torch.cuda.is_available():
            with pytest.raises(ng.CudaError, match="has no CUDA device, expected one for tensors on cuda:0"):
                layer._apply(move)
            assert layer.packed is block and layer.weight.device == "cpu"
        with pytest.raises(NotImplementedError, match="it cannot be moved to cuda:0"):
            embedding._apply(move)


def test_embedding() -> None:
    q = ng.quantize(torch.randn(48, 96), ng.fp6)
    embedding = ng.nn.Embedding(q, torch.bfloat16, padding_idx=0)
    indices = torch.tensor([[0, 47, 3], [3, 3, 1]])
    rows = embedding(indices)
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, q.dequantize(torch.bfloat16)[indices])
    assert torch.equal(embedding(indices.int().T), rows.transpose(0, 1))
    assert embedding(torch.empty(0, dtype=torch.int64)).shape == (0, 96)
    assert embedding.float()(indices).dtype == torch.float32
    assert "48, 96, dtype=torch.float32, format=fp6_e2m3:g128:fp16" in repr(embedding)
    for bad in (48, -1):
        with pytest.raises(ValueError, match=str(bad)):
            embedding(torch.tensor([1, bad]))
