"""`narrowgauge doctor`: what this machine has, what narrowgauge makes of it, and what it does not use yet."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

import narrowgauge as ng
from narrowgauge import _native
from narrowgauge.cli.output import JsonOption, Output, table

_READ_BYTES = 512 << 20  # well above any cache here
_READ_RUNS = 5
_ROOMS = ("quantize", "linear")  # those with kernels per instruction set
_NEEDS = {
    "avx2": ("avx2", "fma", "f16c", "bmi2", "sse4_2", "pclmulqdq"),
    "avx512": (
        "avx512f",
        "avx512bw",
        "avx512dq",
        "avx512vl",
        "avx512_vbmi",
        "avx512_vbmi2",
        "avx512_vnni",
    ),
    "amx": ("amx_tile", "amx_bf16", "amx_int8"),
}


class Finding(NamedTuple):
    """An optional part of the machine: whether it is there, what was seen, and what it would enable."""

    name: str
    found: bool
    seen: str
    enables: str


def command(json: JsonOption = False) -> None:
    """Show the CPU, the kernels and file I/O chosen and why, threads, memory bandwidth, and optional parts found."""
    output = Output(json)
    if torch_version() is not None:
        importlib.import_module("narrowgauge.ops")  # the kernels then run on torch's threads, as they do in use
    with output.progress() as progress:
        progress.add_task("measuring memory bandwidth", total=None)
        bandwidth = read_bandwidth()
    report: dict[str, Any] = {
        "narrowgauge": ng.__version__,
        "python": platform.python_version(),
        "torch": torch_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _native.cpu_name(),
        "cpu_features": list(_native.cpu_features()),
        "isa": _native.isa(),
        "isa_reason": isa_reason(),
        "kernels": {room: _native.isa() for room in _ROOMS},
        "threads": _native.threads(),
        "executor": _native.executor_name(),
        "read_bandwidth_gb_s": bandwidth,
        "huge_pages": huge_pages(),
        "numa_nodes": _native.numa_nodes(),
        "io_engine": "threads" if _native.why_no_io_uring() else "io_uring",
        "io_reason": io_reason(),
        "optional": [finding._asdict() for finding in optional_parts()],
    }
    output.result(report, _summary(report), _optional(report))


def _summary(report: dict[str, Any]) -> Table:
    bandwidth = report["read_bandwidth_gb_s"]
    rows = [
        ("narrowgauge", f"{report['narrowgauge']}, Python {report['python']}, torch {report['torch'] or 'not found'}"),
        ("system", report["system"]),
        ("CPU", report["cpu"]),
        ("features", " ".join(report["cpu_features"]) or "none that matter here"),
        ("instruction set", f"{report['isa']}: {report['isa_reason']}"),
        ("kernels", ", ".join(f"{room}: {isa}" for room, isa in report["kernels"].items())),
        ("threads", f"{report['threads']} ({report['executor']})"),
        (
            "memory",
            f"{bandwidth:.1f} GB/s streaming read, best of {_READ_RUNS} over {_READ_BYTES >> 20} MiB"
            if bandwidth
            else f"not measured: needs numpy or torch, and {_READ_BYTES >> 20} MiB of free memory",
        ),
        ("huge pages", report["huge_pages"]),
        ("NUMA nodes", ", ".join(map(str, report["numa_nodes"]))),
        ("file I/O", f"{report['io_engine']}: {report['io_reason']}"),
    ]
    return table(["", "found"], rows)


def _optional(report: dict[str, Any]) -> Table:
    rows = [
        (part["name"], "yes" if part["found"] else "no", part["seen"], part["enables"]) for part in report["optional"]
    ]
    return table(["optional part", "found", "seen", "what it would enable"], rows)


def isa_reason() -> str:
    """Why the instruction set in use is the one in use."""
    features, supported = set(_native.cpu_features()), list(_native.supported_isas())
    if forced := os.environ.get("NARROWGAUGE_ISA"):
        return f"forced by NARROWGAUGE_ISA={forced}; this CPU runs up to {supported[-1]}"
    best = supported[-1]
    if _native.isa() != best:
        return f"forced by force_isa(); this CPU runs up to {best}"
    higher = [isa for isa in _NEEDS if isa not in supported]
    if not higher:
        return "the highest there is"
    if reason := _native.why_no_amx():
        return f"AMX is not used: {reason}"
    lacking = [name for name in _NEEDS[higher[0]] if name not in features]
    return f"{higher[0]} needs {', '.join(lacking)}, which this CPU or its operating system does not offer"


def read_bandwidth() -> float | None:
    """GB/s of reading memory on all threads: the limit of a layer whose weights are read once.

    None if there is not enough memory, or neither numpy nor torch.
    """
    try:
        block = _as_array(bytearray(b"\x01") * _READ_BYTES)  # written, so that every page exists
    except (MemoryError, ImportError):
        return None
    best = float("inf")
    for _ in range(_READ_RUNS):
        start = time.perf_counter()
        _native.stream_read(block)
        best = min(best, time.perf_counter() - start)
    return _READ_BYTES / best / 1e9


def torch_version() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return None
    from importlib.metadata import version

    return version("torch")


def huge_pages() -> str:
    """The kernel's setting, in words."""
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting[setting.find("[") + 1 : setting.find("]")] if "[" in setting else "unknown"
    meaning = {
        "always": "transparent for all memory",
        "madvise": "transparent where asked for, as narrowgauge does for weights",
        "never": "off: large matrices pay for more TLB misses",
    }.get(chosen, "no such setting in this kernel")
    reserved = next((line.split()[1] for line in _read("/proc/meminfo").splitlines() if "HugePages_Total" in line), "0")
    return f"{chosen} ({meaning}); {reserved} reserved"


def io_reason() -> str:
    """Why files are transferred as they are, and what limits it."""
    if reason := _native.why_no_io_uring():
        disabled = _read("/proc/sys/kernel/io_uring_disabled").strip()
        return reason + (f"; kernel.io_uring_disabled is {disabled}" if disabled not in ("", "0") else "")
    if _may_lock_memory() or resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return "allowed by the kernel; any memory can be registered with it"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return f"allowed by the kernel; {limit >> 10} KiB of memory can be registered with it (ulimit -l), more works too"


def _may_lock_memory() -> bool:
    cap_ipc_lock = 14
    line = next((line for line in _read("/proc/self/status").splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(line.split()[1], 16) >> cap_ipc_lock & 1)


def optional_parts() -> list[Finding]:
    """What this machine may lack: GPUs, and what later versions can use."""
    mpi = shutil.which("mpirun") or _package("mpi4py")
    later = "; not used by this version"
    return [
        _cuda(),
        Finding("CUDA kernels", bool(kernels := ng.cuda.architectures()),
                kernels or "built without nvcc: install CUDA 12.8 or later and build narrowgauge again",
                "quantize, dequantize and linear on NVIDIA GPUs"),
        _nccl(),
        Finding("MPI", mpi is not None, mpi or "no mpirun on PATH, no mpi4py", "collectives over MPI" + later),
    ]  # fmt: skip


def _cuda() -> Finding:
    enables = "tensors, pools and narrow formats on NVIDIA GPUs"
    if reason := ng.cuda.why_unavailable():
        return Finding("CUDA driver", False, reason, enables)
    devices = ", ".join(
        f"{each.name} (sm_{each.capability}, {each.memory_bytes >> 30} GiB)"
        for each in map(ng.cuda.device, range(ng.cuda.device_count()))
    )
    return Finding("CUDA driver", True, f"CUDA {ng.cuda.driver_version()}: {devices}", enables)


def _nccl() -> Finding:
    """The copy that a collective would use now: torch's, where torch with CUDA has been imported."""
    enables = "narrow collectives between NVIDIA GPUs"
    if reason := _native.why_no_nccl():
        return Finding("NCCL", False, reason, enables)
    version = _native.nccl_version()
    return Finding("NCCL", True, f"NCCL {version // 10000}.{version // 100 % 100}.{version % 100}", enables)


def _package(name: str) -> str | None:
    try:
        return f"Python package {name}" if importlib.util.find_spec(name) is not None else None
    except ModuleNotFoundError:  # the parent of a dotted name is absent
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _as_array(block: bytearray) -> Any:
    """The bytes as an array that speaks DLPack: numpy's or torch's, whichever is installed."""
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        return numpy.frombuffer(block, dtype=numpy.uint8)
    import torch

    return torch.frombuffer(block, dtype=torch.uint8)
