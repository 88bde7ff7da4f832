"""The operators registered with torch.library: what torch.compile, export, autograd and functorch see.

    narrowgauge::linear(x, packed, bias, format, n, k, activations="exact", residual=None)
        y = x @ w.T + bias + residual
    narrowgauge::linear_backward(dy, packed, format, n, k)  dx = dy @ w
    narrowgauge::gather(indices, packed, format, n, k, dtype)  rows of w

`packed` is the block of a packed QTensor, `n` and `k` its rows and columns. linear and its backward run on the CPU and
on GPUs, x being where the block was packed for; gather on the CPU. On a GPU the backward dequantizes the weights into
dy's dtype and leaves the product to torch. The block is frozen: no gradient flows to it; gradients are those of exact
activations. torch.vmap over x, with the residual or without, and double backward work; torch.func.grad does not (torch:
no autograd registered this way does; use torch.autograd.grad). Importing this module imports torch and registers the
operators.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from narrowgauge import _native
from narrowgauge._arrays import library
from narrowgauge.qtensor import QTensor

library("torch")  # adopts torch's threads

_lib: Any = torch.library.Library("narrowgauge", "DEF")  # type: ignore[no-untyped-call]
_check: Any = torch._check
_lib.define(
    "linear(Tensor x, Tensor packed, Tensor? bias, str format, int n, int k, str activations='exact', "
    "Tensor? residual=None) -> Tensor"
)
_lib.define("linear_backward(Tensor dy, Tensor packed, str format, int n, int k) -> Tensor")
_lib.define("gather(Tensor indices, Tensor packed, str format, int n, int k, ScalarType dtype) -> Tensor")

_format = lru_cache(maxsize=None)(_native.Format)


def _matrix(packed: torch.Tensor, format: str, n: int, k: int) -> _native.PackedMatrix:
    return _native.PackedMatrix(packed, _format(format), n, k)


def _rows(x: torch.Tensor, name: str) -> torch.Tensor:
    return x if _native.is_matrix(x, name) else x.contiguous()


def _linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
    activations: str = "exact",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    if bias is not None:
        bias = bias.contiguous()
    if residual is not None:
        residual = _rows(residual, "residual")
    matrix = _matrix(packed, format, n, k)
    return _native.linear(_rows(x, "x"), matrix, bias, None, activations, residual)  # type: ignore[no-any-return]


def _linear_backward_cpu(dy: torch.Tensor, packed: torch.Tensor, format: str, n: int, k: int) -> torch.Tensor:
    return _native.linear_backward_input(_rows(dy, "dy"), _matrix(packed, format, n, k))  # type: ignore[no-any-return]


def _linear_backward_dense(dy: torch.Tensor, packed: torch.Tensor, format: str, n: int, k: int) -> torch.Tensor:
    q = QTensor(_format(format), (n, k), library("torch", str(packed.device)))
    q._set_packed(_matrix(packed, format, n, k))
    return dy @ q.dequantize(dy.dtype)  # type: ignore[no-any-return]


def _gather_cpu(
    indices: torch.Tensor, packed: torch.Tensor, format: str, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    out = torch.empty((*indices.shape, k), dtype=dtype)
    _native.gather_rows(_matrix(packed, format, n, k), indices.contiguous().long(), out)
    return out


def _linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
    activations: str = "exact",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    _native.check_activations(activations, _format(format))
    _check(x.dim() > 0 and x.shape[-1] == k, lambda: f"x has shape {list(x.shape)}, expected [..., {k}]")
    y = x.new_empty((*x.shape[:-1], n))
    if residual is not None:
        _check(
            residual.shape == y.shape,
            lambda: f"residual has shape {list(residual.shape)}, expected that of y, {list(y.shape)}",
        )
    return y


def _linear_backward_fake(dy: torch.Tensor, packed: torch.Tensor, format: str, n: int, k: int) -> torch.Tensor:
    _check(dy.dim() > 0 and dy.shape[-1] == n, lambda: f"dy has shape {list(dy.shape)}, expected [..., {n}]")
    return dy.new_empty((*dy.shape[:-1], k))


def _gather_fake(
    indices: torch.Tensor, packed: torch.Tensor, format: str, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    return indices.new_empty((*indices.shape, k), dtype=dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, packed, bias, *ctx.weights, _, residual = inputs
    ctx.save_for_backward(packed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype


def _linear_grad(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    dx = linear_backward(dy, packed, *ctx.weights) if ctx.needs_input_grad[0] else None
    dbias = None
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        # Summed in fp32 at least, as a narrow sum over many rows would lose them.
        dbias = dy.sum(tuple(range(dy.dim() - 1)), dtype=torch.float32).to(ctx.bias_dtype)
    dresidual = None
    if ctx.residual_dtype is not None and ctx.needs_input_grad[7]:
        dresidual = dy.to(ctx.residual_dtype)
    return dx, None, dbias, None, None, None, None, dresidual


def _linear_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, packed, *ctx.weights = inputs
    ctx.save_for_backward(packed)


def _linear_backward_grad(ctx: Any, ddx: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (packed,) = ctx.saved_tensors
    return linear(ddx, packed, None, *ctx.weights), None, None, None, None


def _linear_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    format: str,
    n: int,
    k: int,
    activations: str = "exact",
    residual: torch.Tensor | None = None,
) -> Any:
    if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
        raise ValueError("vmap of narrowgauge::linear is over x, and the residual if need be, not over weights or bias")
    x = x.movedim(in_dims[0], 0)
    if residual is not None:
        residual = residual.unsqueeze(0) if in_dims[7] is None else residual.movedim(in_dims[7], 0)
        residual = residual.expand(x.shape[0], *residual.shape[1:])
    return linear(x, packed, bias, format, n, k, activations, residual), 0


for _key in ("CPU", "CUDA"):
    _lib.impl("linear", _linear, _key)
_lib.impl("linear_backward", _linear_backward_cpu, "CPU")
_lib.impl("linear_backward", _linear_backward_dense, "CUDA")
_lib.impl("gather", _gather_cpu, "CPU")
torch.library.register_fake("narrowgauge::linear", _linear_fake, lib=_lib)
torch.library.register_fake("narrowgauge::linear_backward", _linear_backward_fake, lib=_lib)
torch.library.register_fake("narrowgauge::gather", _gather_fake, lib=_lib)
torch.library.register_autograd("narrowgauge::linear", _linear_grad, setup_context=_linear_setup, lib=_lib)
torch.library.register_autograd(
    "narrowgauge::linear_backward", _linear_backward_grad, setup_context=_linear_backward_setup, lib=_lib
)
torch.library.register_vmap("narrowgauge::linear", _linear_vmap, lib=_lib)

linear = torch.ops.narrowgauge.linear.default
linear_backward = torch.ops.narrowgauge.linear_backward.default
gather = torch.ops.narrowgauge.gather.default
