"""The library's pack and unpack kernels: what the packed layout of GPUs is in numpy (fpx.py), whole sectors on both
sides, no bank conflicts. Every element and ragged shape is packed through the library (cuda_pack_test.cpp).
"""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_int32, c_int64, c_uint8, c_uint32
from pathlib import Path

import numpy as np
import pytest
import simgpu
from fpx import SCALES, pack_codes, pack_records, random_matrix
from shipped import image
from simgpu import static
from test_quantize import Arrays, structure

SCALE_TYPES = ("fp32", "fp16", "bf16", "e8m0", "e4m3")

# The struct of cuda/kernels/pack_args.hpp.
PackArgs = structure(
    "PackArgs",
    canonical=Arrays,
    **dict.fromkeys(("codes", "records", "row_scales", "specials"), c_int64),
    **dict.fromkeys(("rows", "cols", "row_bytes", "groups", "stages", "tiles"), c_int64),
    **dict.fromkeys(("record_bytes", "record_zeros"), c_int32),
    scale=c_uint8,
    base=c_int32,
    flip=c_uint32,
    special=c_uint32,
)


@pytest.fixture(scope="module")
def program() -> simgpu.Program:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    return image("sm80_pack")


class Case:
    """A matrix on a device, canonical and packed."""

    def __init__(self, element: str, group: int, kind: str, rows: int, cols: int) -> None:
        self.matrix = m = random_matrix(np.random.default_rng(rows), element, group, kind, rows, cols)
        self.device, e = simgpu.Device(), m.element
        bits = (m.codes[:, :, None] >> np.arange(e.bits) & 1).astype(np.uint8).reshape(rows, -1)
        self.codes = np.packbits(bits, axis=1, bitorder="little")
        self.packed_codes, self.packed_records = pack_codes(m), pack_records(m).ravel()
        self.args = PackArgs(
            rows=rows,
            cols=cols,
            row_bytes=self.codes.shape[1],
            groups=m.scales.shape[1],
            stages=-(-cols // 64),
            tiles=-(-rows // 64),
            record_zeros=64 * m.scales.itemsize if group else 0,
            scale=SCALE_TYPES.index("fp32" if kind == "row" else kind),
            base=10 - e.mantissa if e.kind == "fp" else 0,
            flip=(1 << e.bits - 1) * 0x01010101 if e.kind == "int" else 0,
            special=256,
        )
        self.args.record_bytes = self.args.record_zeros + (64 if m.zeros is not None else 0)
        self.suffix = "nf4" if e.kind == "nf4" else str(e.bits)

    def launch(
        self, program: simgpu.Program, name: str, arrays: list[np.ndarray | None], sections: list[np.ndarray | None]
    ) -> tuple[simgpu.Launch, list[simgpu.Buffer | None]]:
        """The canonical arrays and the sections of the packed block, on the device; empty ones are to be written."""

        def put(array: np.ndarray | None) -> simgpu.Buffer | None:
            return None if array is None or not array.size else self.device.array(array)

        buffers = [put(array) for array in [*arrays, *sections]]
        pointers = [buffer.ptr if buffer else 0 for buffer in buffers]
        self.args.canonical = Arrays(*pointers[:3], 0)
        self.args.codes, self.args.records = pointers[3:]
        assert program.find(name).params[0].size == ctypes.sizeof(self.args)
        along = -(-self.args.groups // 32) if "records" in name else -(-self.args.cols // 1024)
        count = self.args.tiles * (1 if "records" in name else 4)
        return program.launch(name, (along, count), 256, [bytes(self.args)], self.device).clean(), buffers


def check(launch: simgpu.Launch, moved: int, elements: int, instructions: float) -> None:
    counters = launch.counters
    assert counters.hot_conflicts() == []
    for seen in counters.global_accesses.values():
        assert seen.sector_use == 1, seen.ins.text
    assert 32 * sum(seen.sectors for seen in counters.global_accesses.values()) == moved
    per_element = launch.totals["thread_instructions"] / elements
    print(f"{launch.kernel.name}: {per_element:.1f} instructions an element")
    assert per_element <= instructions


ELEMENTS = ["int2", "fp3_e1m1", "uint4", "nf4", "fp5_e2m2", "fp6_e2m3", "int7", "int8"]


@pytest.mark.parametrize("element", ELEMENTS)
def test_codes(program: simgpu.Program, element: str) -> None:
    case = Case(element, 64, "fp16", 64, 2048)
    moved, elements = case.codes.size + case.packed_codes.size, case.matrix.codes.size
    blank = [np.zeros_like(case.codes), np.zeros_like(case.packed_codes)]
    name = f"codes_{case.suffix}"
    launch, (_, _, _, packed, _) = case.launch(program, f"pack_{name}", [case.codes, None, None], [blank[1], None])
    assert np.array_equal(packed.get(), case.packed_codes)
    check(launch, moved, elements, instructions=17)
    launch, (codes, *_) = case.launch(program, f"unpack_{name}", [blank[0], None, None], [case.packed_codes, None])
    assert np.array_equal(codes.get(), case.codes)
    check(launch, moved, elements, instructions=17)


@pytest.mark.parametrize("kind", SCALES[1:])
@pytest.mark.parametrize("element", ["fp4_e2m1", "uint4"])
def test_records(program: simgpu.Program, element: str, kind: str) -> None:
    case = Case(element, 32, kind, 128, 2048)
    m = case.matrix
    moved = m.scales.nbytes + case.packed_records.size + (m.zeros.size if m.zeros is not None else 0)
    elements = 2 * m.scales.size
    blank = [np.zeros_like(m.scales), None if m.zeros is None else np.zeros_like(m.zeros)]
    launch, (*_, records) = case.launch(
        program, "pack_records", [None, m.scales, m.zeros], [None, np.zeros_like(case.packed_records)]
    )
    assert np.array_equal(records.get(), case.packed_records)
    check(launch, moved, elements, instructions=44)
    launch, (_, scales, zeros, *_) = case.launch(program, "unpack_records", [None, *blank], [None, case.packed_records])
    assert np.array_equal(scales.get(), m.scales)
    assert m.zeros is None or np.array_equal(zeros.get(), m.zeros)
    check(launch, moved, elements, instructions=44)


@pytest.mark.parametrize("kernel", ["pack_codes_6", "unpack_codes_6", "pack_records"])
def test_every_synchronisation_is_needed(program: simgpu.Program, kernel: str) -> None:
    """Dropping any barrier of a kernel is noticed."""
    case = Case("fp6_e2m3", 32, "fp16", 16, 2100)
    m, kept, seen = case.matrix, [], 0
    records = np.zeros_like(case.packed_records)
    for copies, mutant in simgpu.sync_mutants(program.module, program.find(kernel)):
        seen += 1
        try:
            case.launch(simgpu.Program(mutant), kernel, [case.codes, m.scales, m.zeros], [case.packed_codes, records])
        except (simgpu.SimError, AssertionError):
            continue
        kept.append((copies[0].text, copies[0].source))
    assert seen >= 1
    assert not kept, kept


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_registers(program: simgpu.Program, tmp_path: Path, arch: str) -> None:
    path = tmp_path / "pack.ptx"
    path.write_text(program.module.text)
    for name, kernel in static.resources(path, arch).items():
        print(f"{arch} {name}: {kernel.registers} registers, {kernel.shared} bytes of shared memory")
        assert kernel.registers <= 80, name  # three blocks of 256 threads
        assert kernel.stack == kernel.spill_stores == kernel.spill_loads == 0, name
