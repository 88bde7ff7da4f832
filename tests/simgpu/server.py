"""A simulator process of the simulated GPU: runs the kernels that the stand-in libcuda.so.1 hands to it.

    python3 server.py WINDOW_BYTES BASE...

Started by libcuda/simulator.cpp, which states the protocol too. File 3 is the socket to the library, file 4 + d the
memory of device d: WINDOW_BYTES of contents, then a shadow byte for each, both shared with the library and the other
processes. The device's addresses start at BASE. One request is served at a time. What a launch did wrong is written to
the standard error output; the reply says which CUDA error it is. The end of the socket is the end of the process.
"""

from __future__ import annotations

import contextlib
import gc
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

SOCKET, FIRST_MEMORY = 3, 4
SUCCESS, INVALID_PTX, ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, MISALIGNED, LAUNCH_FAILED = 0, 218, 700, 702, 716, 719
LOAD, LAUNCH = 1, 2


class WindowDevice(simgpu.Device):
    """A device whose memory belongs to another process: that one allocates, and the flags say what."""

    def __init__(self, file: int, window: int, base: int) -> None:
        shared = np.frombuffer(mmap.mmap(file, 2 * window), np.uint8)
        self.base = base
        self.bytes, self.flags = shared[:window], shared[window:]
        self.views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.buffers = []
        self.top = window

    def where(self, address: int) -> str:
        """Found by the flags near the address."""
        reach, offset = 4 << 20, int(address) - self.base
        if not 0 <= offset < self.bytes.size:
            return f"the device's memory starts at {self.base:#x}"
        start = max(0, offset - reach)
        mapped = start + np.flatnonzero(self.flags[start : offset + reach] & simgpu.memory.ALLOCATED)
        if mapped.size == 0:
            return "no memory is mapped near it"
        nearest = int(mapped[np.abs(mapped - offset).argmin()])
        side = "before" if nearest < offset else "after"
        return f"the nearest mapped byte is {self.base + nearest:#x}, {abs(offset - nearest)} bytes {side} it"


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
    def __init__(self, window: int, bases: list[int]) -> None:
        self.devices = [WindowDevice(FIRST_MEMORY + d, window, base) for d, base in enumerate(bases)]
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
            program.launch(name, grid, block, arguments, device, shared=shared).clean()
        except (simgpu.SimError, simgpu.PtxError) as error:
            report(f"{name} with grid {grid}, block {block}, {shared} bytes of dynamic shared memory:\n{error}")
            return classify(str(error)), ""
        except Exception:  # a fault of the simulator is told like one of the kernel
            report(f"{name} with grid {grid}, block {block}: the simulator failed\n{traceback.format_exc()}")
            return LAUNCH_FAILED, ""
        return SUCCESS, ""


def classify(message: str) -> int:
    first = message.partition("\n")[0]
    if "misaligned" in first:
        return MISALIGNED
    if re.search(r"out-of-bounds|null-pointer|read-only memory", first):
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
    server = Server(int(sys.argv[1]), [int(base) for base in sys.argv[2:]])
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
