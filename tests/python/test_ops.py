"""The registered operators: opcheck, torch.compile, export, fake tensors."""

import narrowgauge as ng
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def q() -> ng.QTensor:
    torch.manual_seed(0)
    return ng.quantize(torch.randn(48, 96), ng.fp6).pack()


def weights(q: ng.QTensor) -> tuple[str, int, int]:
    return str(q.format), q.rows, q.cols


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_linear(q: ng.QTensor, bias: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 96, dtype=dtype, requires_grad=True)
    b = torch.randn(48, dtype=dtype, requires_grad=True) if bias else None
    torch.library.opcheck(ng.ops.linear, (x, q.packed, b, *weights(q)))
    torch.library.opcheck(ng.ops.linear, (x, q.packed, b, *weights(q), "int8"))
    residual = torch.randn(2, 3, 48, requires_grad=True)
    torch.library.opcheck(ng.ops.linear, (x, q.packed, b, *weights(q), "exact", residual))


def test_opcheck_linear_backward(q: ng.QTensor) -> None:
    dy = torch.randn(2, 48, requires_grad=True)
    torch.library.opcheck(ng.ops.linear_backward, (dy, q.packed, *weights(q)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_backward_by_dense_weights(q: ng.QTensor, dtype: torch.dtype) -> None:
    """What GPUs run, on the CPU."""
    dy = torch.randn(2, 3, 48).to(dtype)
    dx = ng.ops._linear_backward_dense(dy, q.packed, *weights(q))
    assert dx.shape == (2, 3, 96) and dx.dtype == dtype
    assert torch.equal(dx, dy @ q.dequantize(torch.float32).to(dtype))


def test_residual(q: ng.QTensor) -> None:
    """Added before y is rounded, with a gradient of its own dtype, from the function, the module and vmap."""
    x, bias = torch.randn(2, 3, 96), torch.randn(48)
    plain, residual = ng.linear(x, q, bias), torch.randn(2, 3, 48, dtype=torch.bfloat16, requires_grad=True)
    y = ng.linear(x, q, bias, residual=residual)
    assert torch.equal(y, plain + residual)
    assert torch.equal(ng.linear(x, q, bias, residual=residual.detach()), y)
    assert torch.equal(ng.nn.Linear(q, bias)(x, residual), y)
    assert torch.equal(torch.vmap(lambda a, b: ng.linear(a, q, bias, residual=b))(x, residual), y)
    y.square().sum().backward()
    assert residual.grad is not None and torch.equal(residual.grad, (2 * y.detach()).bfloat16())
    strided = torch.randn(2, 48, 3).movedim(1, 2)
    assert torch.equal(ng.linear(x, q, bias, residual=strided), plain + strided)
    as_numpy = ng.linear(x.numpy(), q, residual=residual.detach().float().numpy())
    assert torch.equal(torch.from_numpy(as_numpy), ng.linear(x, q, residual=residual.detach().float()))
    with pytest.raises(ValueError, match=r"residual has shape \[48\], expected that of y, \[2, 3, 48\]"):
        ng.linear(x, q, residual=bias)
    with pytest.raises(TypeError, match="residual has dtype float64"):
        ng.linear(x, q, residual=plain.double())


def test_opcheck_gather(q: ng.QTensor) -> None:
    torch.library.opcheck(ng.ops.gather, (torch.tensor([[1, 2], [47, 0]]), q.packed, *weights(q), torch.bfloat16))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(q: ng.QTensor, backend: str) -> None:
    torch._dynamo.reset()
    bias = torch.randn(48)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ng.linear(x * 2, q, bias)) + ng.linear(x, q, activations="int16")

    x = torch.randn(5, 96)
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x), f(x), atol=1e-5)
    assert torch.allclose(compiled(x[:3]), f(x[:3]), atol=1e-5)  # another size: dynamic shapes


def test_compile_trains(q: ng.QTensor) -> None:
    torch._dynamo.reset()
    layer = ng.nn.Linear(q, torch.randn(48))
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), layer)
    x = torch.randn(4, 96)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export(q: ng.QTensor, strict: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(96, 96), ng.nn.Linear(q)).eval()
    x = torch.randn(4, 96)
    program = torch.export.export(model, (x,), strict=strict)
    assert "narrowgauge.linear" in program.graph_module.code
    assert torch.allclose(program.module()(x), model(x))


def test_embedding_compiles(q: ng.QTensor) -> None:
    torch._dynamo.reset()
    embedding = ng.nn.Embedding(q, torch.bfloat16)
    indices = torch.tensor([[3, 1, 3]])
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(indices), embedding(indices))


def test_fake_tensors(q: ng.QTensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(7, 96, dtype=torch.bfloat16)
        y = ng.linear(x, q)
        assert y.shape == (7, 48) and y.dtype == torch.bfloat16
        assert ng.nn.Linear(q, activations="int8")(x).shape == (7, 48)
        with pytest.raises(ValueError, match="activations are 'int9'"):
            ng.linear(x, q, activations="int9")
        assert ng.nn.Embedding(q, torch.float16)(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, 96)
    with pytest.raises(ValueError, match="x has no memory behind it"):
        ng._native.linear(x, q._matrix)


def test_fake_tensors_on_a_gpu(q: ng.QTensor) -> None:
    """What torch.compile sees there. The kernel is registered; with torch it has not run."""
    for name, found in (("linear", True), ("linear_backward", True), ("gather", False)):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"narrowgauge::{name}", "CUDA") == found
    with FakeTensorMode():
        x = torch.empty(7, 96, dtype=torch.float16, device="cuda")
        packed, bias = torch.empty(64, dtype=torch.uint8, device="cuda"), torch.empty(48, device="cuda")
        y = ng.ops.linear(x, packed, bias, *weights(q))
        assert y.shape == (7, 48) and y.dtype == torch.float16 and y.device.type == "cuda"
        assert ng.ops.linear(x, packed, bias, *weights(q), "exact", y.float()).shape == (7, 48)
        with pytest.raises(RuntimeError, match=r"residual has shape \[48\], expected that of y, \[7, 48\]"):
            ng.ops.linear(x, packed, None, *weights(q), "exact", bias)
        dx = ng.ops.linear_backward(y, packed, *weights(q))
        assert dx.shape == (7, 96) and dx.dtype == torch.float16 and dx.device.type == "cuda"
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="expected cpu, where q is"):
        ng.linear(x, q)


def test_tracing_sees_the_operator(q: ng.QTensor) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: ng.linear(x, q), tracing_mode="fake", _allow_non_fake_inputs=True)(torch.randn(2, 96))
    assert "narrowgauge.linear" in graph.code


def test_subclasses_keep_their_type(q: ng.QTensor) -> None:
    class Sub(torch.Tensor):
        pass

    x = torch.randn(2, 96)
    y = ng.linear(x.as_subclass(Sub), q)
    assert type(y) is Sub and torch.equal(y.as_subclass(torch.Tensor), ng.linear(x, q))


def test_op_errors_are_clear(q: ng.QTensor) -> None:
    with pytest.raises(ValueError, match="packed has .* bytes, expected"):
        ng.ops.linear(torch.randn(2, 96), q.packed[:-64], None, *weights(q))
    with pytest.raises(ValueError, match="fp99"):
        ng.ops.linear(torch.randn(2, 96), q.packed, None, "fp99", 48, 96)
