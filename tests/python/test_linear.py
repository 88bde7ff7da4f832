"""linear from Python: shapes, dtypes, strides, both array libraries, gradients, and what is refused."""

import subprocess
import sys

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def close(y: torch.Tensor, x: torch.Tensor, q: ng.QTensor, bias: torch.Tensor | None = None) -> bool:
    """Whether y is within the bound that linear.hpp states."""
    w = q.dequantize().reshape(q.rows, q.cols).double()
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = 2.0**-24 * (16 + q.cols / 16) * size + ROUNDOFF[y.dtype] * exact.abs() + 1e-30
    if y.dtype == torch.float16:
        bound = bound + 2.0**-25  # subnormal results
    return bool(((y.double() - exact).abs() <= bound).all())


@pytest.fixture(params=[ng.fp6, ng.int8, ng.nf4, ng.nvfp4, ng.Format("uint4:g64:bf16")], ids=str)
def q(request: pytest.FixtureRequest) -> ng.QTensor:
    torch.manual_seed(0)
    return ng.quantize(torch.randn(72, 200), request.param).pack()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(200,), (1, 200), (3, 200), (2, 3, 200), (1, 1, 1, 200), (65, 200)])
def test_shapes(q: ng.QTensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    y = ng.linear(x, q)
    assert y.shape == (*shape[:-1], 72) and y.dtype == dtype and close(y, x, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_bias(q: ng.QTensor, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    x, bias = torch.randn(4, 200).to(dtype), torch.randn(72).to(bias_dtype)
    assert close(ng.linear(x, q, bias), x, q, bias)


def test_strided_x_is_copied(q: ng.QTensor) -> None:
    base = torch.randn(6, 5, 400)
    for x in (base[..., ::2], base[::2, 1:3, :200], base[:, :, :200].transpose(0, 1), base[0, 0, :200].expand(3, 200)):
        assert torch.equal(ng.linear(x, q), ng.linear(x.contiguous(), q))
    array = base.numpy()[..., ::-2]
    assert np.array_equal(ng.linear(array, q), ng.linear(array.copy(), q))


def test_empty() -> None:
    for w, x in ((torch.zeros(0, 16), torch.randn(3, 16)), (torch.zeros(8, 16), torch.randn(0, 16))):
        for q in (ng.quantize(w, ng.fp6).pack(), ng.quantize(w.numpy(), ng.fp6).pack()):
            assert ng.linear(x, q).shape == (x.shape[0], w.shape[0])
            assert ng.linear(x.numpy(), q).shape == (x.shape[0], w.shape[0])
    q = ng.quantize(torch.zeros(8, 0), ng.fp6).pack()
    bias = torch.randn(8)
    assert torch.equal(ng.linear(torch.zeros(2, 0), q), torch.zeros(2, 8))
    assert torch.equal(ng.linear(torch.zeros(2, 0), q, bias), bias.expand(2, 8))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numpy(q: ng.QTensor, dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    x = np.random.default_rng(0).standard_normal((2, 3, 200)).astype(kind)
    bias = np.linspace(-1, 1, 72).astype(kind)
    y = ng.linear(x, q, bias)
    t = ng.linear(
        torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)), q, torch.from_numpy(bias.astype(np.float32))
    )
    assert isinstance(y, np.ndarray) and y.dtype == kind
    assert np.array_equal(y.astype(np.float32), t.float().numpy())


def test_numpy_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, narrowgauge as ng
w = np.random.default_rng(0).standard_normal((48, 96), dtype=np.float32)
x = np.random.default_rng(1).standard_normal((5, 96), dtype=np.float32)
q = ng.quantize(w, ng.fp6).pack()
assert np.abs(ng.linear(x, q) - x @ q.dequantize().T).max() < 1e-4
try:
    ng.nn
except ImportError:
    pass
else:
    raise SystemExit("narrowgauge.nn was imported without torch")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Foreign:
    """An array of a library that narrowgauge does not know, as JAX is: DLPack and no more."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def test_other_libraries_cross_by_dlpack(q: ng.QTensor) -> None:
    x = np.random.default_rng(0).standard_normal((3, 200), dtype=np.float32)
    y = ng.linear(Foreign(x), q)
    assert isinstance(y, np.ndarray) and np.array_equal(y, ng.linear(x, q))
    assert ng.quantize(Foreign(x), ng.int8).codes.tobytes() == ng.quantize(x, ng.int8).codes.tobytes()


def test_canonical_weights_work_with_a_warning() -> None:
    q, x = ng.quantize(torch.randn(16, 64), ng.fp6), torch.randn(2, 64)
    with pytest.warns(ng.PerformanceWarning, match="q.pack"):
        y = ng.linear(x, q)
    assert not q.is_packed and torch.equal(y, ng.linear(x, q.pack()))


def test_negative_bit(q: ng.QTensor) -> None:
    z = torch.randn(3, 200, dtype=torch.complex64)
    x = z.conj().imag
    assert x.is_neg()
    assert torch.equal(ng.linear(x, q), ng.linear(x.clone().resolve_neg().contiguous(), q))
    bias = torch.randn(72, dtype=torch.complex64).conj().imag
    assert torch.equal(ng.linear(x, q, bias), ng.linear(x, q, bias.resolve_neg().contiguous()))
    with pytest.raises(TypeError, match="x has dtype complex64"):
        ng.linear(z, q)


def test_wrong_arguments(q: ng.QTensor) -> None:
    x = torch.randn(2, 200)
    with pytest.raises(ValueError, match=r"x has shape \[2, 199\], expected \[..., 200\]"):
        ng.linear(x[:, 1:], q)
    with pytest.raises(ValueError, match=r"x has shape \[\]"):
        ng.linear(torch.tensor(1.0), q)
    with pytest.raises(ValueError, match=r"bias has shape \[71\], expected \[72\]"):
        ng.linear(x, q, torch.zeros(71))
    with pytest.raises(TypeError, match="x has dtype int64, expected float32"):
        ng.linear(x.long(), q)
    with pytest.raises(TypeError, match="x has dtype float64"):
        ng.linear(x.double().numpy(), q)
    with pytest.raises(TypeError, match="bias has dtype int32"):
        ng.linear(x, q, torch.zeros(72, dtype=torch.int32))
    with pytest.raises(TypeError, match="x is a list"):
        ng.linear([[1.0]], q)
    with pytest.raises(TypeError, match="x is a NoneType"):
        ng.linear(None, q)
    with pytest.raises(TypeError, match="q is a Tensor, expected a QTensor"):
        ng.linear(x, x)


LIMITS = {"int16": 32512, "int8": 127}


def rounded(x: torch.Tensor, activations: str) -> torch.Tensor:
    """x as activations= says that it is rounded, in float64."""
    amax = x.float().abs().amax(-1, keepdim=True)
    limit = torch.full_like(amax, LIMITS[activations])  # torch divides a number by a tensor in two roundings
    step, inverse = amax / limit, limit / amax
    return (x.float() * inverse).round().double() * step.double()


@pytest.mark.parametrize("activations", LIMITS)
@pytest.mark.parametrize("format", ["fp6", "int8", "mxfp4", "uint4:g64:bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_activations(activations: str, format: str, dtype: torch.dtype) -> None:
    q = ng.quantize(torch.randn(72, 200), format).pack()
    for shape in ((200,), (3, 200), (2, 5, 200)):
        x, bias = torch.randn(shape).to(dtype), torch.randn(72)
        y = ng.linear(x, q, bias, activations=activations)
        assert y.shape == (*shape[:-1], 72) and y.dtype == dtype
        assert close(y, rounded(x, activations), q, bias)
        assert not close(y, x, q, bias) or activations == "int16"
        assert torch.equal(ng.linear(x.expand(2, *shape)[1], q, bias, activations=activations), y)
        if dtype == torch.float32:
            assert np.array_equal(ng.linear(x.numpy(), q, bias.numpy(), activations=activations), y.numpy())


def test_rounded_activations_are_seen_to_be_wrong() -> None:
    q = ng.quantize(torch.randn(72, 200), "fp6").pack()
    x = torch.randn(2, 200)
    y = ng.linear(x, q, activations="int8")
    x[1, 199] += x[1].abs().max() / 127
    assert not close(y, rounded(x, "int8"), q)


def test_rounded_activations_keep_nan() -> None:
    q, x = ng.quantize(torch.randn(16, 64), "int8").pack(), torch.ones(3, 64)
    x[0, 5], x[2, 63] = float("nan"), float("inf")
    for activations in LIMITS:
        y = ng.linear(x, q, activations=activations)
        assert y[[0, 2]].isnan().all() and y[1].isfinite().all()


def test_gradients_are_those_of_exact_activations() -> None:
    q, x = ng.quantize(torch.randn(16, 64), "fp6").pack(), torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, 16)
    grads = []
    for activations in ("exact", "int8"):
        ng.linear(x, q, activations=activations).backward(upstream)
        grads.append(x.grad)
        x.grad = None
    assert torch.equal(*grads)


def test_wrong_activations() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="activations are 'int4'; expected 'exact', 'int16' or 'int8'"):
        ng.linear(x, ng.quantize(torch.randn(16, 64), "int8").pack(), activations="int4")
    for format in ("nf4", "fp8", "fp6_e3m2"):
        q = ng.quantize(torch.randn(16, 64), format).pack()
        for array in (x, x.numpy()):
            with pytest.raises(ValueError, match="activations are int8, but the elements of .*expected intN"):
                ng.linear(array, q, activations="int8")
        with pytest.raises(ValueError, match="activations are int16, but"):
            ng.nn.Linear(q, activations="int16")


def test_gradients(q: ng.QTensor) -> None:
    x = torch.randn(3, 4, 200, requires_grad=True)
    bias = torch.randn(72, requires_grad=True)
    upstream = torch.randn(3, 4, 72)
    ng.linear(x, q, bias).backward(upstream)
    w = q.dequantize()
    assert torch.allclose(x.grad, upstream @ w, rtol=1e-4, atol=1e-4)
    assert torch.allclose(bias.grad, upstream.sum((0, 1)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not ng.linear(x, q, bias).requires_grad
    with torch.inference_mode():
        ng.linear(x, q, bias)


def test_double_backward() -> None:
    q = ng.quantize(torch.randn(16, 32), ng.int8).pack()
    w = q.dequantize()
    x = torch.randn(2, 32, requires_grad=True)
    (grad,) = torch.autograd.grad((ng.linear(x, q) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, 2 * torch.ones(2, 32) @ w.T @ w, rtol=1e-3, atol=1e-3)


def test_vmap(q: ng.QTensor) -> None:
    x = torch.randn(5, 3, 200)
    y = ng.linear(x, q)
    assert torch.allclose(torch.vmap(lambda v: ng.linear(v, q))(x), y)
    assert torch.allclose(torch.vmap(lambda v: ng.linear(v, q), in_dims=1, out_dims=1)(x), y)


def test_weights_made_in_inference_mode_train() -> None:
    with torch.inference_mode():
        q = ng.quantize(torch.randn(16, 32), ng.fp6).pack()
    x = torch.randn(2, 32, requires_grad=True)
    ng.linear(x, q).sum().backward()
    assert x.grad is not None


def test_lora_over_frozen_weights_trains() -> None:
    torch.manual_seed(0)
    target, x = torch.randn(32, 64) / 8, torch.randn(64, 64)
    base = ng.nn.Linear(ng.quantize(target, ng.int4))
    down, up = torch.nn.Linear(64, 24, bias=False), torch.nn.Linear(24, 32, bias=False)
    first = torch.nn.Linear(64, 64)  # ahead of the frozen layer: its gradient passes through
    torch.nn.init.eye_(first.weight)
    torch.nn.init.zeros_(up.weight)
    parameters = [*down.parameters(), *up.parameters(), *first.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    before, codes = None, base.weight.codes.clone()
    for _ in range(100):
        h = first(x)
        loss = torch.nn.functional.mse_loss(base(h) + up(down(h)), x @ target.T)
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < before / 3
    assert torch.equal(base.weight.codes, codes)
