"""linear: y = x @ w.T + bias + residual with narrow weights.

Plain torch tensors that need no gradient go straight to the extension module. Everything else that torch has
(gradients, torch.compile, fake tensors, subclasses, functorch) goes through the operator registered in ops.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from narrowgauge import _arrays, _native
from narrowgauge._arrays import FLOATS, Array
from narrowgauge.errors import PerformanceWarning
from narrowgauge.qtensor import QTensor


class _NoTensor:
    """No object's type: what linear compares with until torch is first used."""


# Set by _use_torch.
_tensor_type: Any = _NoTensor
_is_compiling: Callable[[], bool] = bool
_is_grad_enabled: Callable[[], bool] = bool


def _use_torch() -> None:
    global _tensor_type, _is_compiling, _is_grad_enabled
    torch: Any = _arrays.library("torch").torch  # type: ignore[attr-defined]
    _is_compiling, _is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
    _tensor_type = torch.Tensor


def linear(
    x: Array,
    q: QTensor,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    activations: str = "exact",
) -> Array:
    """y = x @ w.T + bias + residual: x [..., K], q [N, K], bias [N] or None -> y [..., N] in x's dtype.

    x, bias and residual: float32, float16 or bfloat16 torch tensors (or numpy arrays; then y is one), each of a dtype
    of its own. x may have any strides. residual: [..., N] or None, added in float32 before y is rounded. Gradients flow
    to all three; the weights are frozen. A canonical q works too, slowly, with a PerformanceWarning.

    activations: "exact" multiplies by x as it is. "int16" and "int8" round every row of x to integers times a step of
    its own, max |x| / 32512 or / 127, and are faster, where the elements of q are integers times a power of two: intN,
    uintN, fp4_e2m1, fp5_e2m2, fp6_e2m3 and so on (linear.hpp has them all), on the CPU. The error of y is that of the
    rounding, at most 0.51 step sum|w|. A row with NaN or infinity gives NaN. Gradients are those of exact activations.

    On a GPU, where all of them must be (ng.Tensors, torch tensors or others with DLPack; y is an ng.Tensor but for
    torch's): x is float16 or bfloat16, and the work is given to the current stream; nothing waits. The gradient for a
    torch tensor x is a product with weights that are dequantized into its dtype anew, each time.

    TypeError for a wrong type, ValueError for a wrong shape, device or activations.
    """
    if (
        type(x) is _tensor_type
        and not _is_compiling()
        and not (
            _is_grad_enabled()
            and (
                x.requires_grad
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
            )
        )
        and not x.is_neg()
    ):
        try:
            return _native.linear(x, q._matrix, bias, None, activations, residual)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, AttributeError):
            pass  # x needs a copy, or something is wrong: below, in order
    return _linear(x, q, bias, residual, activations)


def _linear(x: Array, q: QTensor, bias: Array | None, residual: Array | None, activations: str) -> Array:
    if not isinstance(q, QTensor):
        raise TypeError(f"q is a {type(q).__name__}, expected a QTensor")
    for name, array in (("x", x), ("bias", bias), ("residual", residual)):
        if array is not None and (device := _device(array, name)) not in (q.device, "meta"):
            raise ValueError(f"{name} is on device {device}, expected {q.device}, where q is; q.pack(device) moves it")
    if not q.is_packed:
        warnings.warn(
            "linear packs a canonical QTensor anew at every call; call q.pack() once", PerformanceWarning, stacklevel=3
        )
        q = q.__copy__().pack()
    torch_x = _arrays.is_torch(x)
    if torch_x and not _is_compiling():
        _use_torch()
    if not torch_x:
        # Whatever speaks DLPack, in numpy's terms, on a GPU in ours.
        arrays = _arrays.library_of(x, "x")
        source = arrays.source(x, "x")
        offset = None if bias is None else arrays.source(bias, "bias")
        added = None if residual is None else arrays.source(residual, "residual")
        _check(source, q, offset, added)
        y = arrays.empty((*source.shape[:-1], q.rows), str(source.dtype))
        _native.linear(source, q._matrix, offset, y, activations, added)  # type: ignore[arg-type]
        dtype = str(getattr(x, "dtype", None))
        return arrays.cast(y, dtype) if dtype in FLOATS else y
    _check(x, q, bias, residual)
    from narrowgauge import ops

    return ops.linear(x, q.packed, bias, q._name, q.rows, q.cols, activations, residual)


def _device(array: Array, name: str) -> str:
    return str(array.device) if _arrays.is_torch(array) else _arrays.library_of(array, name).device


def _check(x: Array, q: QTensor, bias: Array | None, residual: Array | None) -> None:
    """Raises what is wrong with the arguments, with names and values."""
    for name, array in (("x", x), ("bias", bias), ("residual", residual)):
        if array is None:
            continue
        dtype = str(array.dtype).removeprefix("torch.")
        expected = FLOATS[1:] if name == "x" and q.device != "cpu" else FLOATS
        if dtype not in expected:
            raise TypeError(f"{name} has dtype {dtype}, expected {', '.join(expected)} on {q.device}")
    if len(x.shape) == 0 or x.shape[-1] != q.cols:
        raise ValueError(
            f"x has shape {list(x.shape)}, expected [..., {q.cols}] for weights of shape {list(q.shape)} ({q._name})"
        )
    if bias is not None and tuple(bias.shape) != (q.rows,):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{q.rows}]")
    if residual is not None and tuple(residual.shape) != (*x.shape[:-1], q.rows):
        raise ValueError(f"residual has shape {list(residual.shape)}, expected that of y, {[*x.shape[:-1], q.rows]}")
