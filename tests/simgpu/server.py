"""A simulator process of the simulated GPU: runs the kernels that the stand-in libcuda.so.1 hands to it.

    python3 server.py WINDOW_BYTES BASE...

Started by libcuda/simulator.cpp, which states the protocol too. File 3 is the socket to the library, file 4 + d the
memory of device d: WINDOW_BYTES of contents, then a shadow byte for each, both shared with the library and the other
processes. The device's addresses start at BASE. One request is served at a time. What a launch did wrong is written to
the standard error output; the reply says which CUDA error it is. The end of the socket is the end of the process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import struct
import sys
import traceback

import numpy as np
import simgpu
import simgpu.machine
import simgpu.memory

SOCKET, FIRST_MEMORY = 3, 4
SUCCESS, INVALID_PTX, ILLEGAL_ADDRESS, LAUNCH_TIMEOUT, MISALIGNED, LAUNCH_FAILED = 0, 218, 700, 702, 716, 719
LOAD, LAUNCH = 1, 2


class WindowMemory(simgpu.memory.GlobalMemory):
    """Global memory that another process owns: it allocates, and the shadow bytes say what."""

    def __init__(self, file: int, window: int, base: int) -> None:
        shared = np.frombuffer(mmap.mmap(file, 2 * window), np.uint8)
        self.base = base
        self.bytes, self.flags = shared[:window], shared[window:]
        self.views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        self.buffers = []
        self.top = window

    def where(self, addr: int) -> str:
        """Found by the shadow bytes near the address."""
        reach, off = 4 << 20, int(addr) - self.base
        if not 0 <= off < self.bytes.size:
            return f"device memory starts at {self.base:#x}"
        start = max(0, off - reach)
        allocated = start + np.flatnonzero(self.flags[start : off + reach] & simgpu.memory.ALLOC)
        if allocated.size == 0:
            return "no memory is mapped near it"
        nearest = int(allocated[np.abs(allocated - off).argmin()])
        side = "before" if nearest < off else "after"
        return f"the nearest mapped byte is {self.base + nearest:#x}, {abs(off - nearest)} bytes {side} it"


class Device:
    def __init__(self, memory: WindowMemory) -> None:
        self.mem = memory

    def select(self) -> None:
        """The simulator knows one base address; each device has its own."""
        for module in (simgpu, simgpu.machine, simgpu.memory):
            module.GLOBAL_BASE = self.mem.base


def global_variables(program: simgpu.Program) -> list:
    every = program.module.vars + [v for kernel in program.kernels.values() for v in kernel.vars]
    return [v for v in every if v.space in ("global", "const") and v.size]


def describe(program: simgpu.Program) -> str:
    """A module in lines of words: its PTX version, its kernels, its variables."""
    lines = [f"version {program.module.version.replace('.', '')}"]
    module_shared = [v for v in program.module.vars if v.space == "shared"]
    for kernel in program.kernels.values():
        words = {word for instruction in kernel.code for word in re.findall(r"[\w$]+", instruction.text)}
        shared = local = 0
        for v in module_shared + kernel.vars:
            if v.space == "shared" and not v.extern and v.name in words:
                shared = -(-shared // v.align) * v.align + v.size
            if v.space == "local":
                local = -(-local // v.align) * v.align + v.size
        bound = kernel.directives.get("maxntid") or kernel.directives.get("reqntid") or "1024"
        threads = int(np.prod([int(n) for n in bound.split(",")]))
        places = " ".join(f"{p.offset} {p.size}" for p in kernel.params)
        lines.append(f"kernel {kernel.name} {shared} {local} {threads} {places}")
    for v in global_variables(program):
        contents = (v.init or bytes(v.size)).hex()
        lines.append(f"variable {v.name} {v.space} {max(16, v.align)} {v.size} {contents}")
    return "\n".join(lines)


class Server:
    def __init__(self, window: int, bases: list[int]) -> None:
        self.devices = [Device(WindowMemory(FIRST_MEMORY + d, window, base)) for d, base in enumerate(bases)]
        self.programs: dict[int, simgpu.Program] = {}

    def load(self, request: bytes) -> tuple[int, str]:
        (module,) = struct.unpack_from("<Q", request)
        try:
            program = simgpu.Program(request[8:].decode())
        except Exception as error:  # whatever a parser makes of text that is not PTX
            return INVALID_PTX, f"{type(error).__name__}: {error}"
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
        device.select()
        program._globals[id(device)] = {
            v.name: simgpu.memory.Buffer(device.mem, address - device.mem.base, v.size, np.uint8, (v.size,))
            for v, address in zip(global_variables(program), addresses, strict=True)
        }
        arguments = [parameters[p.offset : p.offset + p.size] for p in program.kernels[name].params]
        try:
            program.launch(name, grid, block, arguments, device, shared=shared).clean()
        except simgpu.PtxError as error:
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
