"""The commands: mutation of synchronisations, and tables of costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import simgpu
from simgpu.__main__ import main
from simgpu.mutants import judge

CASES = Path(__file__).parent / "cases.py"
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

# Through shared memory, with one barrier too many and one that no small case reaches; %s: comments beside them.
SOURCE = """
extern "C" __global__ void turn(const int* in, int* out) {
  __shared__ int s[64];
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  __syncthreads();%s
  out[threadIdx.x] = s[63 - threadIdx.x];
  if (in[0] < 0) {
    __syncthreads();
    out[0] = 0;
  }
}
"""
DECLARATION = """
import numpy as np
import simgpu

@simgpu.case("turn.cu", "turn", elements=64)
def turn(program):
    device = simgpu.Device(1 << 16)
    out = device.empty(64, np.int32)
    launch = program.launch("turn", 1, 64, [device.array(np.arange(64, dtype=np.int32)), out], device).clean()
    assert out.get().tolist() == list(range(63, -1, -1))
    return launch
"""


def test_survivors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "turn.cu").write_text(SOURCE % "  // sync: for show")
    declaration = tmp_path / "turn_cases.py"
    declaration.write_text(DECLARATION)
    verdicts = list(judge(simgpu.load_cases(declaration)))
    # Either of the first two barriers may be dropped: the other does its work.
    assert [verdict.outcome for verdict in verdicts] == ["SURVIVED", "excused", "SURVIVED"]
    assert [verdict.reason for verdict in verdicts] == ["nothing noticed", "for show", "no case executes it"]
    assert main(["mutate", str(declaration)]) == 1
    assert "3 synchronisations of 1 kernels, 2 can be dropped unnoticed" in capsys.readouterr().out


# Two kernels of the same lines: the barrier is behind a branch that only the second case takes.
SHARED = """
__device__ __forceinline__ void turn(const int* in, int* out) {
  __shared__ int s[32];
  s[threadIdx.x] = in[threadIdx.x];
  if (in[0] == 0) {
    __syncwarp();
    out[threadIdx.x] = s[31 - threadIdx.x];
  }
}
extern "C" __global__ void turn_never(const int* in, int* out) { turn(in, out); }
extern "C" __global__ void turn_always(const int* in, int* out) { turn(in, out); }
"""
SHARED_DECLARATION = """
import numpy as np
import simgpu

def launch(program, kernel, first):
    device = simgpu.Device(1 << 16)
    values = np.arange(first, first + 32, dtype=np.int32)
    return program.launch(kernel, 1, 32, [device.array(values), device.empty(32, np.int32)], device).clean()

never = simgpu.case("turn.cu", "turn_never", elements=32)(lambda program: launch(program, "turn_never", 1))
always = simgpu.case("turn.cu", "turn_always", elements=32)(lambda program: launch(program, "turn_always", 0))
"""


def test_what_a_case_does_not_reach_may_be_caught_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "turn.cu").write_text(SHARED)
    declaration = tmp_path / "turn_cases.py"
    declaration.write_text(SHARED_DECLARATION)
    assert main(["mutate", str(declaration), "never"]) == 1
    capsys.readouterr()
    assert main(["mutate", str(declaration)]) == 0
    elsewhere, caught = (line.split() for line in capsys.readouterr().out.splitlines()[2:4])
    assert elsewhere[:2] == ["elsewhere", "turn_never"] and caught[:2] == ["caught", "turn_always"]


def test_kernels_without_a_case_are_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "turn.cu").write_text(SHARED)
    declaration = tmp_path / "turn_cases.py"
    declaration.write_text(SHARED_DECLARATION.replace("never = ", "always = ", 1).replace("turn_never", "turn_always"))
    assert main(["mutate", str(declaration)]) == 1
    assert "turn_never synchronises and has no case" in capsys.readouterr().out


def test_a_synchronisation_is_caught_by_any_case_of_its_kernel(tmp_path: Path) -> None:
    (tmp_path / "turn.cu").write_text(SHARED)
    declaration = tmp_path / "turn_cases.py"
    declaration.write_text(SHARED_DECLARATION.replace("turn_never", "turn_always"))
    never, always = simgpu.load_cases(declaration)
    assert [verdict.outcome for verdict in judge([never])] == ["SURVIVED"]
    assert [verdict.outcome for verdict in judge([never, always])] == ["caught"]


def test_mutation_of_a_reduction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutate", str(CASES), "reduce"]) == 0
    assert "read after write: no barrier between warps" in capsys.readouterr().out


@pytest.mark.nightly
@pytest.mark.parametrize("case", simgpu.load_cases(CASES), ids=lambda case: case.kernel)
def test_every_synchronisation_is_needed(case: simgpu.Case) -> None:
    survivors = [verdict for verdict in judge([case]) if verdict.survived]
    assert not survivors


@pytest.mark.nightly
def test_every_synchronisation_of_the_library_is_needed() -> None:
    """But of linear: see test_fpx_linear.py."""
    assert main(["mutate", str(CASES.with_name("codec_cases.py"))]) == 0


def test_report_of_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(CASES), "vadd", "strided"]) == 0
    headings, _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert headings[:3] == ["kernel", "registers", "spills"]
    vadd, strided = rows
    assert vadd[0] == "vadd" and vadd[2:9] == ["0", "8000", "250", "1.00", "4000", "125", "1.00"]
    assert 0 < int(vadd[1]) < 64
    assert strided[0] == "strided" and strided[3:6] == ["128", "32", "0.12"]


def test_report_of_counters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = simgpu.load_cases(CASES)[0]
    totals = case.run(case.program()).totals
    file = tmp_path / "counters.jsonl"
    file.write_text("".join(json.dumps({"kernel": name, "totals": totals}) + "\n" for name in ("a", "b", "a")))
    assert main(["report", str(file), "a"]) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines()[2:])
    assert row[:4] == ["a", "-", "-", str(2 * totals["global"]["cp.async"]["bytes"])]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["mutate"]) == main(["run", str(CASES)]) == 2
    assert main(["report", str(CASES), "no such kernel"]) == 2
    assert "has no case of no such kernel" in capsys.readouterr().err
