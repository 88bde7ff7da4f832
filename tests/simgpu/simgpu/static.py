"""Facts about compiled kernels that need no run: registers and spills, occupancy, SASS opcodes, embedded PTX.

Asks ptxas, nvcc and cuobjdump; occupancy is computed from the limits in the CUDA programming guide. The only part of
simgpu that looks at what ptxas makes of PTX.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: the programming guide's table "Technical Specifications per Compute Capability"."""

    threads: int
    blocks: int
    shared: int  # bytes
    shared_per_block: int
    registers: int = 65536
    register_unit: int = 256  # warps get registers in units of this many
    shared_unit: int = 128
    shared_reserved: int = 1024  # of each block, by the system


LIMITS = {
    "sm_80": Limits(2048, 32, 164 << 10, 163 << 10),
    "sm_86": Limits(1536, 16, 100 << 10, 99 << 10),
    "sm_89": Limits(1536, 24, 100 << 10, 99 << 10),
    "sm_90": Limits(2048, 32, 228 << 10, 227 << 10),
    "sm_90a": Limits(2048, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(2048, 32, 228 << 10, 227 << 10),
    "sm_120": Limits(1536, 24, 100 << 10, 99 << 10),
}
_PARTITIONS = 4  # of a multiprocessor: its register file is split between them


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # resident on a multiprocessor
    warps: int
    share: float  # of the warps that it can hold
    limited_by: tuple[str, ...]


def occupancy(arch: str, threads: int, registers: int, shared: int) -> Occupancy:
    """For blocks of so many threads with so many registers each and so many bytes of shared memory."""
    limits = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // limits.register_unit) * limits.register_unit
    register_warps = limits.registers // per_warp // _PARTITIONS * _PARTITIONS if registers else limits.blocks * warps
    per_block = -(-(shared + limits.shared_reserved) // limits.shared_unit) * limits.shared_unit
    most = {
        "registers": register_warps // warps,
        "shared memory": limits.shared // per_block if shared <= limits.shared_per_block else 0,
        "threads": limits.threads // 32 // warps,
        "blocks": limits.blocks,
    }
    blocks = min(most.values())
    limited_by = tuple(name for name, count in most.items() if count == blocks)
    return Occupancy(blocks, blocks * warps, round(blocks * warps * 32 / limits.threads, 3), limited_by)


@dataclass
class Resources:
    """What ptxas gave a kernel: bytes, but for registers and barriers."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    barriers: int = 0


def resources(path: str | Path, arch: str = "sm_80", flags: Sequence[str] = ()) -> dict[str, Resources]:
    """By kernel, of a .cu or .ptx file."""
    with tempfile.TemporaryDirectory() as directory:
        cubin = str(Path(directory, "kernel.cubin"))
        if Path(path).suffix == ".ptx":
            command = ["ptxas", "-v", f"-arch={arch}", *flags, "-o", cubin, str(path)]
        else:
            command = ["nvcc", "-Xptxas", "-v", "-cubin", f"-arch={arch}", "-std=c++17", *flags, "-o", cubin, str(path)]
        return _parse_resources(_run(command).stderr)


def _parse_resources(log: str) -> dict[str, Resources]:
    by_kernel: dict[str, Resources] = {}
    kernel = Resources()
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)'", line):
            kernel = by_kernel.setdefault(match.group(1), Resources())
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, match.groups())
        if match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match.group(1))
            for name, pattern in (("shared", r"(\d+) bytes smem"), ("barriers", r"used (\d+) barriers")):
                if match := re.search(pattern, line):
                    setattr(kernel, name, int(match.group(1)))
    return by_kernel


def tool(name: str) -> str | None:
    """Where cuobjdump or nvdisasm is: in the toolkit, or in NVIDIA's wheel of that name."""
    if path := shutil.which(name):
        return path
    spec = find_spec("nvidia")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    return next((str(path) for root in roots for path in sorted(Path(root).glob(f"*/bin/{name}"))), None)


def _cuobjdump() -> str:
    path = tool("cuobjdump")
    if path is None:
        raise RuntimeError("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return path


def _run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    result: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    return result


def sass(path: str | Path, arch: str | None = None) -> dict[str, dict[str, int]]:
    """By kernel, how often each opcode stands in the code of a .cubin, .o or .so."""
    cuobjdump = _cuobjdump()
    # It calls nvdisasm, which the wheels install beside each other but not on the path.
    folders = [os.path.dirname(found) for found in (cuobjdump, tool("nvdisasm")) if found]
    environment = {**os.environ, "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}
    command = [cuobjdump, "-sass", *(["-arch", arch] if arch else []), str(path)]
    by_kernel: dict[str, dict[str, int]] = {}
    opcodes: dict[str, int] = {}
    for line in _run(command, env=environment).stdout.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            opcodes = by_kernel.setdefault(match.group(1), {})
        if match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][A-Z0-9_.]*)", line):
            opcodes[match.group(1)] = opcodes.get(match.group(1), 0) + 1
    return by_kernel


def embedded_ptx(path: str | Path) -> dict[str, str]:
    """The PTX texts that a built .so or .o ships, by the names that cuobjdump gives them."""
    with tempfile.TemporaryDirectory() as directory:
        _run([_cuobjdump(), "-xptx", "all", str(Path(path).resolve())], cwd=directory)
        return {file.name: file.read_text() for file in sorted(Path(directory).iterdir())}
