"""Modules over a packed QTensor: Linear and Embedding. Weights are frozen; biases and inputs have gradients.

The block is the buffer `packed` (u8, so that .to(dtype) leaves it alone); state_dict holds the portable arrays
instead (`weight.codes`, `weight.scales`, ..., and `weight.format`, the Format's name in ASCII) and loads them back.
Modules that share a QTensor (a tied lm_head and embedding) share its memory. Like a parameter it moves with a module:
.to("cuda") packs it anew for the GPU, in place, and the modules that share it share it there too. Linear runs on GPUs,
with x in float16 or bfloat16; Embedding does not.
"""

from __future__ import annotations

from typing import Any

import torch

from narrowgauge import _native, ops
from narrowgauge._native import Format
from narrowgauge.linear import linear
from narrowgauge.qtensor import Canonical, QTensor, quantize


class _Narrow(torch.nn.Module):
    packed: torch.Tensor

    def __init__(self, weight: QTensor) -> None:
        super().__init__()
        if len(weight.shape) != 2:
            raise ValueError(f"weight has shape {list(weight.shape)}, expected two axes")
        if not isinstance((block := weight.pack().packed), torch.Tensor):
            raise TypeError(f"weight holds {type(block).__name__} arrays, expected a QTensor made from a torch tensor")
        self._q = weight
        self.register_buffer("packed", block, persistent=False)

    @property
    def weight(self) -> QTensor:
        """The packed weights [rows, cols]."""
        # Read past Module.__getattr__, which is slow. The buffer is another tensor after .to() and the like.
        block = self._buffers["packed"]
        if self._q._packed is not block:
            q = self._q.__copy__()
            q._set_packed(_native.PackedMatrix(block, q.format, q.rows, q.cols))
            self._q = q
        return self._q

    @property
    def format(self) -> Format:
        return self._q.format

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, array in zip(Canonical._fields, self.weight.canonical(), strict=True):
            if array is not None:
                destination[f"{prefix}weight.{name}"] = array
        destination[f"{prefix}weight.format"] = torch.tensor(list(self._q._name.encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        keys = {name: f"{prefix}weight.{name}" for name in (*Canonical._fields, "format")}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in keys.values()]
        q = self.weight
        expected = [name for name, array in zip(Canonical._fields, q.canonical(), strict=True) if array is not None]
        missing = [keys[name] for name in expected if keys[name] not in state_dict]
        if missing:
            missing_keys.extend(missing)
            return
        if (stored := state_dict.get(keys["format"])) is not None:
            name = bytes(stored.tolist()).decode("ascii", "replace")
            if name != q._name:
                error_msgs.append(f"{prefix}weight has format {name}, expected {q._name}")
                return
        try:
            arrays = (state_dict.get(keys[name]) for name in Canonical._fields)
            canonical = Canonical(*(None if array is None else array.contiguous() for array in arrays))
            # Into the same block, which another module may share.
            q.assign(QTensor.from_canonical(q.format, q.shape, canonical))
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def _apply(self, fn: Any, recurse: bool = True) -> _Narrow:
        block = self.packed
        device = fn(torch.empty(0, dtype=block.dtype, device=block.device)).device
        if {block.device.type, device.type} == {"cpu", "cuda"}:
            # Each has a layout of its own: a copy of the bytes would be wrong there.
            if self._q.device != str(device):  # else a module that shares the matrix has taken it there
                self._q = self.weight.pack(str(device))
            self._buffers["packed"] = self._q.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # Pickles and copies carry the QTensor, which is portable, and not the block; modules that share one still do.

    def __getstate__(self) -> dict[str, Any]:
        buffers = {name: buffer for name, buffer in self._buffers.items() if name != "packed"}
        return {**self.__dict__, "_q": self.weight, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.register_buffer("packed", self._q.pack().packed, persistent=False)


class Linear(_Narrow):
    """y = x @ weight.T + bias, as torch.nn.Linear, with a narrow weight [out_features, in_features]; called with a
    residual [..., out_features] as well, it is added, as by narrowgauge.linear.

    weight: a QTensor made from a torch tensor; it is packed, and shared with the caller. bias: [out_features] or None.
    activations: as for narrowgauge.linear; may be set later. save_model keeps it, state_dict does not.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, weight: QTensor, bias: torch.Tensor | None = None, *, activations: str = "exact") -> None:
        super().__init__(weight)
        _native.check_activations(activations, weight.format)
        self.activations = activations
        self.out_features, self.in_features = weight.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{self.out_features}]")
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls, module: torch.nn.Linear, format: Format | str, *, search: str = "absmax", activations: str = "exact"
    ) -> Linear:
        """Quantizes the weight of `module`; the bias is shared with it."""
        return cls(quantize(module.weight, format, search=search), module.bias, activations=activations)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if type(x) is torch.Tensor and not torch.compiler.is_dynamo_compiling():
            return linear(  # type: ignore[no-any-return]
                x, self.weight, self._parameters["bias"], residual=residual, activations=self.activations
            )
        q = self._q
        return ops.linear(  # type: ignore[no-any-return]
            x, self.packed, self.bias, q._name, q.rows, q.cols, self.activations, residual
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, activations={self.activations}"
        )


class Embedding(_Narrow):
    """Rows of a narrow weight [num_embeddings, embedding_dim] in `dtype`, as torch.nn.Embedding gathers them.

    dtype: float32, float16 or bfloat16; .to(dtype) changes it. indices: integers of any shape [...] ->
    [..., embedding_dim]; ValueError names the first one out of range.
    """

    def __init__(self, weight: QTensor, dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> None:
        super().__init__(weight)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype
        self.padding_idx = padding_idx

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        q = self._q
        return ops.gather(  # type: ignore[no-any-return]
            indices, self.packed, q._name, q.rows, q.cols, self.dtype
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Embedding:
        # What becomes of a parameter of this dtype becomes of the dtype.
        like = fn(torch.empty(0, dtype=self.dtype))
        if like.device.type == "cuda":
            raise NotImplementedError(f"narrowgauge.nn.Embedding runs on the CPU; it cannot be moved to {like.device}")
        self.dtype = like.dtype
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}, format={self.format}"
