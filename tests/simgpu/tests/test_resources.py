"""What ptxas makes of the library's kernels, but those of linear: registers, spills, local memory, wide accesses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import simgpu
from shipped import image
from simgpu import static

pytestmark = pytest.mark.nightly

IMAGES = ("sm80_quantize", "sm80_pack", "sm80_wire")


@pytest.fixture(scope="module", params=IMAGES)
def program(request: pytest.FixtureRequest) -> simgpu.Program:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return image(request.param)


def ceiling(kernel: simgpu.Kernel) -> int:
    """Registers of a thread that leave room for the blocks that the kernel's launch bounds name."""
    threads, blocks = (int(kernel.directives[name].split(",")[0]) for name in ("maxntid", "minnctapersm"))
    return min(255, 65536 // (threads * blocks) // 8 * 8)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_registers(program: simgpu.Program, tmp_path: Path, arch: str) -> None:
    """ptxas takes 20 s for each of quantize."""
    path = tmp_path / "kernels.ptx"
    path.write_text(program.module.text)
    found = static.resources(path, arch)
    assert found.keys() == program.kernels.keys()
    for name, used in found.items():
        most = ceiling(program.kernels[name])
        print(f"{arch} {name}: {used.registers} of {most} registers, {used.shared} bytes of shared memory")
        assert used.registers <= most, name
        assert used.stack == used.spill_stores == used.spill_loads == 0, name


def test_machine_code(program: simgpu.Program, tmp_path: Path) -> None:
    if static.tool("cuobjdump") is None or static.tool("nvdisasm") is None:
        pytest.skip("cuobjdump or nvdisasm is not installed")
    path, cubin = tmp_path / "kernels.ptx", tmp_path / "kernels.cubin"
    path.write_text(program.module.text)
    subprocess.run(["ptxas", "-arch=sm_80", "-o", cubin, path], check=True)
    kernels = static.sass(cubin)
    assert kernels.keys() == program.kernels.keys()
    for name, opcodes in kernels.items():
        print(f"{name}: {sum(opcodes.values())} instructions")
        assert not any(opcode.startswith(("LDL", "STL")) for opcode in opcodes), name
        if name.startswith(("quantize_groups", "dequantize")):
            assert any(opcode.startswith("LDG.E.128") for opcode in opcodes), name
