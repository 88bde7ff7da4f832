"""A loaded PTX module: from CUDA source, PTX text or file to launches.

compile and compile_text run nvcc and leave nothing on disk. A launch runs its blocks in batches, one batch after the
other; blocks that wait for each other must be in one batch.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from .launch import Argument, Dim, Launch
from .machine import Machine
from .memory import Device
from .parser import parse
from .ptx import Kernel, Variable
from .scheduler import Scheduler

_BATCH_LANES = 4096  # larger arrays cost more in caches than they save in calls


class Program:
    def __init__(self, text: str) -> None:
        self.module = parse(text)
        self.kernels = self.module.kernels
        self._globals: WeakKeyDictionary[Device, Mapping[str, int]] = WeakKeyDictionary()

    def find(self, name: str) -> Kernel:
        """By its full name, or by a part that only one kernel has."""
        if name in self.kernels:
            return self.kernels[name]
        matches = [kernel for full, kernel in self.kernels.items() if name in full]
        if len(matches) != 1:
            raise KeyError(f"{len(matches)} kernels match {name!r}; there are {', '.join(self.kernels)}")
        return matches[0]

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Argument],
        device: Device,
        shared: int = 0,
        *,
        race: bool = True,
        count_memory: bool = True,
        batch: int | None = None,
        max_steps: int = 2_000_000,
        cross_block: bool = True,
    ) -> Launch:
        """Runs a kernel to its end. `shared` is dynamic shared memory in bytes.

        race: check shared memory for races and missing waits. count_memory: count sectors and bank conflicts.
        batch: blocks that run together. max_steps: turns of the scheduler after which a kernel that goes on looping is
        stopped. cross_block: find two blocks that store to the same byte; turn it off for a kernel that orders them.
        """
        launch = Launch(
            self.module,
            self.find(name),
            device,
            self._globals_on(device),
            _dim(grid),
            _dim(block),
            args,
            shared=shared,
            race=race,
            count_memory=count_memory,
            max_steps=max_steps,
            cross_block=cross_block,
        )
        if batch is None:
            batch = max(1, _BATCH_LANES // ((launch.threads + 31) // 32 * 32))
        for first in range(0, launch.blocks, batch):
            scheduler = Scheduler(Machine(launch, range(first, min(launch.blocks, first + batch))))
            scheduler.run()
            launch.turns = max(launch.turns, scheduler.turn)
        return launch

    @property
    def variables(self) -> list[Variable]:
        """Those of the module that lie in device memory."""
        every = self.module.variables + [v for kernel in self.kernels.values() for v in kernel.variables]
        return [variable for variable in every if variable.space in ("global", "const") and variable.size]

    def place_variables(self, device: Device, addresses: Mapping[str, int]) -> None:
        """For a device whose memory someone else manages: that one has allocated and initialised them."""
        self._globals[device] = addresses

    def _globals_on(self, device: Device) -> Mapping[str, int]:
        """Addresses of the module's variables, which are made at its first launch and live as long as the device."""
        if device not in self._globals:
            addresses = {}
            for variable in self.variables:
                buffer = device.allocate(variable.size, align=max(16, variable.align))
                buffer.set(np.frombuffer(variable.initial or bytes(variable.size), np.uint8))
                addresses[variable.name] = buffer.ptr
            self._globals[device] = addresses
        return self._globals[device]


def _dim(size: int | Sequence[int]) -> Dim:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"a grid or block has one to three positive sizes, not {size}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def load(path: str | Path) -> Program:
    return Program(Path(path).read_text())


def compile(path: str | Path, arch: str = "sm_80", flags: Sequence[str] = (), nvcc: str = "nvcc") -> Program:
    """A .cu file; `flags` are more arguments for nvcc."""
    with tempfile.TemporaryDirectory() as directory:
        ptx = Path(directory, "kernel.ptx")
        standard = [] if any(flag.startswith("-std") for flag in flags) else ["-std=c++17"]
        command = [nvcc, "-ptx", "-lineinfo", f"-arch={arch}", *standard, *flags, "-o", str(ptx), str(path)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        return load(ptx)


def compile_text(text: str, arch: str = "sm_80", flags: Sequence[str] = (), nvcc: str = "nvcc") -> Program:
    """CUDA source text."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cu")
        path.write_text(text)
        return compile(path, arch, flags, nvcc)
