"""Checked loads and stores: bounds, alignment, initialisation and races, with the counters that go with them.

Every access of an instruction to global, shared or local memory passes through here, whatever address space it names.
Addresses are one for each lane; values are unsigned arrays of shape (lanes, elements).
"""

from __future__ import annotations

import numpy as np

from .machine import Machine
from .memory import ALLOCATED, INITIALISED, LOCAL_WINDOW, READ_ONLY, SHARED_WINDOW, WINDOW
from .ptx import Instruction
from .steps import ALL, Lanes

# Stores that may meet others at the same byte: what the PTX memory model calls strong.
_STRONG = frozenset(("volatile", "relaxed", "release", "mmio"))


def load(
    m: Machine, ins: Instruction, space: str, lanes: np.ndarray, addresses: np.ndarray, element: int, count: int
) -> np.ndarray:
    m.now += 1
    size = element * count
    if space == "generic":
        parts = split_generic(addresses)
        if len(parts) == 1:
            return load(m, ins, parts[0][0], lanes, parts[0][2], element, count)
        out = np.empty((len(lanes), count), f"u{element}")
        for part, which, inside in parts:
            out[which] = load(m, ins, part, lanes[which], inside, element, count)
        return out
    if space in ("global", "const"):
        offsets = check_global(m, ins, lanes, addresses, size, "read")
        m.counters.global_access(ins, "load", lanes, offsets, size)
        view = m.device.views[element]
    elif space == "shared":
        offsets = check_shared(m, ins, lanes, addresses, size, "read")
        m.counters.shared_access(ins, "load", lanes, addresses, size, m.lane_count)
        if m.shared.check:
            m.shared.note_read(lanes, offsets, size, m.now, ins)
        view = m.shared.views[element]
    else:
        offsets = check_local(m, ins, lanes, addresses, size, "read")
        view = m.local_views[element]
    first = offsets // element
    return view[first][:, None] if count == 1 else view[first[:, None] + np.arange(count)]


def store(
    m: Machine, ins: Instruction, space: str, lanes: np.ndarray, addresses: np.ndarray, values: np.ndarray
) -> None:
    m.now += 1
    element, count = values.dtype.itemsize, values.shape[1]
    size = element * count
    if space == "generic":
        for part, which, inside in split_generic(addresses):
            store(m, ins, part, lanes[which], inside, values[which])
        return
    same_target = False
    if space == "global":
        offsets = check_global(m, ins, lanes, addresses, size, "write")
        m.counters.global_access(ins, "store", lanes, offsets, size)
        m.device.mark_initialised(offsets, size)
        if not _STRONG.intersection(ins.mods):
            note_global_write(m, ins, lanes, offsets, size)
        view = m.device.views[element]
    elif space == "shared":
        offsets = check_shared(m, ins, lanes, addresses, size, "write")
        m.counters.shared_access(ins, "store", lanes, addresses, size, m.lane_count)
        same_target = m.shared.check and m.shared.note_write(lanes, offsets, size, m.now, ins)
        view = m.shared.views[element]
    else:
        offsets = check_local(m, ins, lanes, addresses, size, "write")
        view = m.local_views[element]
    first = offsets // element
    if count == 1 and not same_target:
        view[first] = values[:, 0]
        return
    at = first[:, None] + np.arange(count)
    view[at] = values
    if same_target and (view[at] != values).any():
        k = np.argmax((view[at] != values).any(1))
        kind = "write after write: two lanes store different values in one instruction"
        m.hazard(kind, ins, lanes[k], int(addresses[k]))


def note_global_write(m: Machine, ins: Instruction, lanes: np.ndarray, offsets: np.ndarray, size: int) -> None:
    """A hazard if another block has written one of the bytes: nothing orders the two."""
    writers = m.launch.writers
    if writers is None:
        return
    found = writers.note(m.blocks[m.block_of[lanes]], offsets, size)
    if found is not None:
        k, other = found
        m.launch.hazard(
            "two blocks write the same global byte",
            ins,
            m.thread_name(lanes[k]),
            m.launch.block_name(other),
            m.device.address(offsets[k]),
        )


def check_global(
    m: Machine, ins: Instruction, lanes: np.ndarray, addresses: np.ndarray, size: int, what: str
) -> np.ndarray:
    """The offsets in device memory. `what` is read, write, atomic or exchange."""
    offsets = m.device.offsets(addresses)
    refuse_unmapped(m, ins, lanes, addresses, (offsets < 0) | (offsets + size > m.device.bytes.size), size, what)
    _check_alignment(m, ins, lanes, addresses, size, f"global {what}")
    flags = m.device.common_flags(offsets, size)
    if (flags == ALLOCATED | INITIALISED).all():
        return offsets
    refuse_unmapped(m, ins, lanes, addresses, (flags & ALLOCATED) == 0, size, what)
    if what != "read":
        protected = (flags & READ_ONLY) != 0
        if protected.any():
            k = np.argmax(protected)
            m.fail(ins, f"{what} of {size} bytes to read-only memory at {addresses[k]:#x}", lanes[k])
    if what in ("read", "atomic"):
        unwritten = (flags & INITIALISED) == 0
        if unwritten.any():
            k = np.argmax(unwritten)
            m.hazard(f"uninitialised global {what}", ins, lanes[k], int(addresses[k]))
    return offsets


def refuse_unmapped(
    m: Machine, ins: Instruction, lanes: np.ndarray, addresses: np.ndarray, bad: np.ndarray, size: int, what: str
) -> None:
    """Stops the kernel at the first of the `bad` accesses to global memory that is not allocated."""
    if not bad.any():
        return
    k = np.argmax(bad)
    address = int(addresses[k])
    offset = int(m.device.offsets(addresses[k : k + 1])[0])
    if 0 <= address < 4096:
        kind = "null-pointer"
    elif 0 <= offset < m.device.bytes.size and m.device.was_freed(offset):
        kind = "use-after-free"
    else:
        kind = "out-of-bounds"
    where = f"{int(bad.sum())} lanes; {m.device.where(address)}"
    m.fail(ins, f"{kind} global {what} of {size} bytes at {address:#x} ({where})", lanes[k])


def _check_own(
    m: Machine,
    ins: Instruction,
    lanes: np.ndarray,
    addresses: np.ndarray,
    size: int,
    what: str,
    limit: int,
    owner: str,
) -> None:
    """Whether addresses are aligned and within the `limit` bytes of memory that `owner` has."""
    bad = (addresses < 0) | (addresses + size > limit)
    if bad.any():
        k = np.argmax(bad)
        m.fail(
            ins,
            f"out-of-bounds {what} of {size} bytes at {addresses[k]:#x} "
            f"({owner} has {limit} bytes; {int(bad.sum())} lanes)",
            lanes[k],
        )
    _check_alignment(m, ins, lanes, addresses, size, what)


def check_shared(
    m: Machine, ins: Instruction, lanes: np.ndarray, addresses: np.ndarray, size: int, what: str
) -> np.ndarray:
    """The offsets in the batch's shared memory."""
    _check_own(m, ins, lanes, addresses, size, f"shared {what}", m.layout.shared_bytes, "the block")
    out: np.ndarray = addresses + m.block_of[lanes] * m.shared.stride
    return out


def check_local(
    m: Machine, ins: Instruction, lanes: np.ndarray, addresses: np.ndarray, size: int, what: str
) -> np.ndarray:
    """The offsets in the batch's local memory."""
    _check_own(m, ins, lanes, addresses, size, f"local {what}", m.layout.local_bytes, "a thread")
    out: np.ndarray = addresses + lanes * m.layout.local_bytes
    return out


def split_generic(addresses: np.ndarray) -> list[tuple[str, Lanes, np.ndarray]]:
    """Generic addresses by space: (space, which of them, their addresses inside the space)."""
    shared = in_shared(addresses)
    local = in_local(addresses)
    parts = (("shared", shared, SHARED_WINDOW), ("local", local, LOCAL_WINDOW), ("global", ~(shared | local), 0))
    for space, mask, base in parts:
        if mask.all():
            return [(space, ALL, addresses - base)]
    return [(space, np.nonzero(mask)[0], addresses[mask] - base) for space, mask, base in parts if mask.any()]


def in_shared(addresses: np.ndarray) -> np.ndarray:
    return (addresses >= SHARED_WINDOW) & (addresses < SHARED_WINDOW + WINDOW)


def in_local(addresses: np.ndarray) -> np.ndarray:
    return (addresses >= LOCAL_WINDOW) & (addresses < LOCAL_WINDOW + WINDOW)


def _check_alignment(
    m: Machine, ins: Instruction, lanes: np.ndarray, addresses: np.ndarray, size: int, what: str
) -> None:
    if size == 1:
        return
    bad = (addresses & (size - 1)) != 0
    if bad.any():
        k = np.argmax(bad)
        m.fail(ins, f"misaligned {what} of {size} bytes at {addresses[k]:#x}, which is no multiple of {size}", lanes[k])
