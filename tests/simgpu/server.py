"""A simulator process of the simulated GPU: runs the kernels that the stand-in libcuda.so.1 hands to it.

    python3 server.py WINDOW_BYTES PINNED_BASE BASE...

Started by libcuda/simulator.cpp, which states the protocol too. File 3 is the socket to the library, file 4 the pinned
host memory, file 5 + d the memory of device d: WINDOW_BYTES of contents, then a shadow byte for each, both shared with
the library and the other processes. Their addresses start at PINNED_BASE and BASE. One request is served at a time.
What a launch did wrong is written to the standard error output; the reply says which CUDA error it is. A line of JSON
for each launch that went right, with its counters, is appended to the file that SIMGPU_COUNTERS names. The end of the
socket is the end of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import mmap
import os
import re
import socket
import struct
import sys
import traceback

import numpy as np
import simgpu
import simgpu.memory
from simgpu.layout import Layout

SOCKET, PINNED, FIRST_MEMORY = 3, 4, 5
GRANULE = 2 << 20  # of mappings
MAP_FIXED, NO_RESERVE = 0x10, 0x4000  # Linux's values, which Python has no names for before 3.13
SUCCESS, INVALID_PTX, ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, MISALIGNED, LAUNCH_FAILED = 0, 218, 700, 702, 716, 719
LOAD, LAUNCH = 1, 2


class WindowDevice(simgpu.Device):
    """A device whose memory belongs to another process: that one allocates, and the flags say what.

    The pinned host memory lies behind the device's own in `bytes`, and has addresses of its own.
    """

    def __init__(self, file: int, window: int, base: int, pinned_base: int) -> None:
        self.base = base
        self.pinned_base = pinned_base
        self.window = window
        self.bytes = map_side_by_side([file, PINNED], 0, window)
        self.flags = map_side_by_side([file, PINNED], window, window)
        self.views = simgpu.memory.words(self.bytes)
        self.flag_views = simgpu.memory.words(self.flags)
        self.buffers = []
        self.top = 2 * window

    def offsets(self, addresses: np.ndarray) -> np.ndarray:
        offsets = addresses - self.base
        inside = (offsets >= 0) & (offsets < self.window)
        if inside.all():
            return offsets
        pinned = addresses - self.pinned_base
        return np.where(inside, offsets, np.where((pinned >= 0) & (pinned < self.window), pinned + self.window, -1))

    def address(self, offset: int) -> int:
        return int(offset) + (self.base if offset < self.window else self.pinned_base - self.window)

    def was_freed(self, offset: int) -> bool:
        """The library marks the first byte of a granule only, to keep the rest of its shadow unused."""
        return super().was_freed(offset // GRANULE * GRANULE)

    def where(self, address: int) -> str:
        """Found by the flags near the address."""
        reach, offset = 4 << 20, int(self.offsets(np.array([address]))[0])
        if offset < 0:
            return f"the device's memory starts at {self.base:#x}, pinned host memory at {self.pinned_base:#x}"
        start = max(0, offset - reach)
        mapped = start + np.flatnonzero(self.flags[start : offset + reach] & simgpu.memory.ALLOCATED)
        if mapped.size == 0:
            return "no memory is mapped near it"
        nearest = int(mapped[np.abs(mapped - offset).argmin()])
        side = "before" if nearest < offset else "after"
        return f"the nearest mapped byte is {self.address(nearest):#x}, {abs(offset - nearest)} bytes {side} it"


def map_side_by_side(files: list[int], offset: int, size: int) -> np.ndarray:
    """The same part of several files, shared, as one array."""
    # Reserves the addresses, which the files then take.
    array = np.frombuffer(
        mmap.mmap(-1, size * len(files), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE), np.uint8
    )
    system_mmap = ctypes.CDLL(None, use_errno=True).mmap
    system_mmap.restype = ctypes.c_void_p
    system_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    for k, file in enumerate(files):
        at = array.ctypes.data + k * size
        flags = mmap.MAP_SHARED | MAP_FIXED
        if system_mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset) != at:
            raise OSError(ctypes.get_errno(), "cannot map the memory that the library shares")
    return array


def describe(program: simgpu.Program) -> str:
    """A module in lines of words: its PTX version, its kernels, its variables."""
    lines = [f"version {program.module.version.replace('.', '')}"]
    addresses = {v.name: 0 for v in program.variables}
    for kernel in program.kernels.values():
        layout = Layout.of(program.module, kernel, addresses, 0)
        bound = kernel.directives.get("maxntid") or kernel.directives.get("reqntid") or "1024"
        threads = math.prod(int(size) for size in bound.split(","))
        places = " ".join(f"{param.offset} {param.size}" for param in kernel.params)
        lines.append(f"kernel {kernel.name} {layout.shared_bytes} {layout.local_bytes} {threads} {places}")
    for v in program.variables:
        lines.append(f"variable {v.name} {v.space} {max(16, v.align)} {v.size} {(v.initial or bytes(v.size)).hex()}")
    return "\n".join(lines)


class Server:
    def __init__(self, window: int, pinned_base: int, bases: list[int]) -> None:
        self.devices = [WindowDevice(FIRST_MEMORY + d, window, base, pinned_base) for d, base in enumerate(bases)]
        self.programs: dict[int, simgpu.Program] = {}

    def load(self, request: bytes) -> tuple[int, str]:
        (module,) = struct.unpack_from("<Q", request)
        gc.disable()  # the many objects of a module live for ever
        try:
            program = simgpu.Program(request[8:].decode())
        except Exception as error:  # whatever a parser makes of text that is not PTX
            return INVALID_PTX, f"{type(error).__name__}: {error}"
        finally:
            gc.freeze()
            gc.enable()
        self.programs[module] = program
        return SUCCESS, describe(program)

    def launch(self, request: bytes) -> tuple[int, str]:
        layout = struct.Struct("<QI3I3I3I")
        module, ordinal, *shape, shared, variables, name_bytes = layout.unpack_from(request)
        grid, block = tuple(shape[:3]), tuple(shape[3:])
        at = layout.size
        addresses = struct.unpack_from(f"<{variables}Q", request, at)
        at += 8 * variables
        name = request[at : at + name_bytes].decode()
        parameters = request[at + name_bytes :]
        program, device = self.programs[module], self.devices[ordinal]
        names = (variable.name for variable in program.variables)
        program.place_variables(device, dict(zip(names, addresses, strict=True)))
        arguments = [parameters[p.offset : p.offset + p.size] for p in program.kernels[name].params]
        try:
            launch = program.launch(name, grid, block, arguments, device, shared=shared).clean()
        except (simgpu.SimError, simgpu.PtxError) as error:
            report(f"{name} with grid {grid}, block {block}, {shared} bytes of dynamic shared memory:\n{error}")
            return classify(str(error)), ""
        except Exception:  # a fault of the simulator is told like one of the kernel
            report(f"{name} with grid {grid}, block {block}: the simulator failed\n{traceback.format_exc()}")
            return LAUNCH_FAILED, ""
        if path := os.environ.get("SIMGPU_COUNTERS"):
            line = {"kernel": name, "grid": grid, "block": block, "shared": shared, "totals": launch.totals}
            with open(path, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")  # one write, like reports
        return SUCCESS, ""


def classify(message: str) -> int:
    first = message.partition("\n")[0]
    if "misaligned" in first:
        return MISALIGNED
    if re.search(r"out-of-bounds|null-pointer|use-after-free|read-only memory", first):
        return ILLEGAL_ADDRESS
    return LAUNCH_TIMEOUT if "no end after" in first else LAUNCH_FAILED


def report(text: str) -> None:
    os.write(sys.stderr.fileno(), f"simgpu: {text.rstrip()}\n".encode())  # one write: reports of processes do not mix


def receive(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            return None
        data += part
    return bytes(data)


def main() -> None:
    connection = socket.socket(fileno=SOCKET)
    window, pinned_base, *bases = map(int, sys.argv[1:])
    server = Server(window, pinned_base, bases)
    while header := receive(connection, 8):
        kind, count = struct.unpack("<II", header)
        request = receive(connection, count)
        if request is None:
            return
        status, text = server.load(request) if kind == LOAD else server.launch(request)
        answer = text.encode()
        connection.sendall(struct.pack("<iI", status, len(answer)) + answer)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
