"""simgpu: runs the PTX of CUDA kernels on a CPU, checks what hardware does not, and counts what a profiler would.

compile() or load() give a Program; Program.launch() runs a kernel on the memory of a Device and returns what was seen.
README.md says what is checked, what is counted and what cannot be seen. Needs numpy, and nvcc to compile.
"""

from .cases import Case, case, load_cases
from .launch import Hazard, Launch, SimError
from .memory import Buffer, Device
from .mutants import sync_mutants
from .program import Program, compile, compile_text, load
from .ptx import Kernel, PtxError

__all__ = [
    "Buffer",
    "Case",
    "Device",
    "Hazard",
    "Kernel",
    "Launch",
    "Program",
    "PtxError",
    "SimError",
    "case",
    "compile",
    "compile_text",
    "load",
    "load_cases",
    "sync_mutants",
]
