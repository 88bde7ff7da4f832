"""Where the variables of a kernel lie, and how finely its accesses to shared memory must be tracked.

Computed once per launch. Static shared variables come first, then those whose size is given at launch, as the CUDA
runtime lays them out; variables that the kernel does not name take no space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .ptx import WIDTH, Instruction, Kernel, Module, Variable, data_type, items, state_space, symbols


@dataclass(frozen=True)
class Layout:
    addresses: Mapping[str, int]  # of every variable, in its own space
    shared_bytes: int  # of a block
    local_bytes: int  # of a thread
    granule: int  # bytes: no access to shared memory is smaller,
    store_granule: int  # and no store to global memory

    @classmethod
    def of(cls, module: Module, kernel: Kernel, globals_at: Mapping[str, int], dynamic_shared: int) -> Layout:
        addresses = dict(globals_at)
        used = {name for ins in kernel.code for name in symbols(ins.args)}
        shared = [v for v in module.variables + kernel.variables if v.space == "shared" and v.name in used]
        top = _place([v for v in shared if not v.dynamic], addresses)
        for variable in shared:
            if variable.dynamic:
                top = _align(top, variable.align)
                addresses[variable.name] = top
        local = _place([v for v in kernel.variables if v.space == "local"], addresses)
        granule = min((_smallest_access(ins) for ins in kernel.code), default=16)
        store_granule = min((_global_store(ins) for ins in kernel.code), default=16)
        return cls(addresses, top + dynamic_shared, _align(local, 16), granule, store_granule)


def _align(offset: int, align: int) -> int:
    return (offset + align - 1) // align * align


def _place(variables: list[Variable], addresses: dict[str, int]) -> int:
    top = 0
    for variable in variables:
        addresses[variable.name] = _align(top, variable.align)
        top = addresses[variable.name] + variable.size
    return top


def _smallest_access(ins: Instruction) -> int:
    if ins.base in ("ld", "st", "atom", "red") and state_space(ins) in ("shared", "generic"):
        return min(16, max(1, WIDTH[data_type(ins)] // 8))
    if ins.base in ("ldmatrix", "stmatrix", "mbarrier"):
        return 8
    return 4 if ins.base == "cp" else 16


def _global_store(ins: Instruction) -> int:
    if ins.base == "st" and state_space(ins) in ("global", "generic"):
        return min(16, max(1, WIDTH[data_type(ins)] // 8) * len(items(ins.args[1])))
    return 16
