"""narrowgauge: narrow number formats for large models.

>>> import narrowgauge as ng
>>> q = ng.quantize(w, ng.fp6).pack()     # w [N, K], a torch tensor or a numpy array
>>> y = ng.linear(x, q)                   # y = x @ w.T

Importing narrowgauge imports neither torch nor numpy nor any extra; what needs them imports them when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from narrowgauge import _native
from narrowgauge._native import FileTier, Format, Tensor, Wire, format_aliases, set_threads, threads
from narrowgauge.collective import Communicator, SecondaryShard
from narrowgauge.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CudaError,
    Error,
    FileCorrupt,
    PerformanceWarning,
    TransportError,
)
from narrowgauge.linear import linear
from narrowgauge.memory import DevicePool, HostPool, PinnedPool, PoolStatistics
from narrowgauge.qtensor import Canonical, QTensor, quantize

if TYPE_CHECKING:
    from narrowgauge import checkpoint, cuda, ddp, deepspeed, fsdp, nn, ops, shards
    from narrowgauge.checkpoint import Checkpointer, PerRank, load_checkpoint, verify_checkpoint
    from narrowgauge.model import LayerReport, QuantizeReport, load_model, quantize_model, save_model

__version__: str = _native.__version__

fp8 = Format("fp8")
fp6 = Format("fp6")
fp5 = Format("fp5")
fp4 = Format("fp4")
int8 = Format("int8")
int4 = Format("int4")
nf4 = Format("nf4")
mxfp8 = Format("mxfp8")
mxfp6 = Format("mxfp6")
mxfp4 = Format("mxfp4")
nvfp4 = Format("nvfp4")

# What is imported when it is first used, by the module that has it (None: the name is the module). Most needs torch.
_LAZY = {
    "Checkpointer": "checkpoint",
    "PerRank": "checkpoint",
    "checkpoint": None,
    "cuda": None,
    "ddp": None,
    "deepspeed": None,
    "fsdp": None,
    "load_checkpoint": "checkpoint",
    "verify_checkpoint": "checkpoint",
    "nn": None,
    "ops": None,
    "LayerReport": "model",
    "QuantizeReport": "model",
    "load_model": "model",
    "quantize_model": "model",
    "save_model": "model",
    "shards": None,
}

__all__ = [
    "Canonical",
    "CheckpointCorrupt",
    "CheckpointError",
    "Checkpointer",
    "Communicator",
    "CudaError",
    "DevicePool",
    "Error",
    "FileCorrupt",
    "FileTier",
    "Format",
    "HostPool",
    "LayerReport",
    "PerRank",
    "PerformanceWarning",
    "PinnedPool",
    "PoolStatistics",
    "QTensor",
    "QuantizeReport",
    "SecondaryShard",
    "Tensor",
    "TransportError",
    "Wire",
    "checkpoint",
    "cuda",
    "ddp",
    "deepspeed",
    "format_aliases",
    "fp4",
    "fp5",
    "fp6",
    "fp8",
    "fsdp",
    "int4",
    "int8",
    "linear",
    "load_checkpoint",
    "load_model",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nf4",
    "nn",
    "nvfp4",
    "ops",
    "quantize",
    "quantize_model",
    "save_model",
    "set_threads",
    "shards",
    "threads",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'narrowgauge' has no attribute '{name}'")
    module = importlib.import_module(f"narrowgauge.{_LAZY[name] or name}")
    value = getattr(module, name) if _LAZY[name] else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
