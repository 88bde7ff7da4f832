"""Kernels with one synchronisation missing, to test tests with.

A synchronisation is one of the CUDA source: the copies that nvcc makes of it by unrolling are dropped together. A test
that passes on such a mutant, without a hazard, does not test that synchronisation, or the kernel does not need it. One
that is kept all the same has its reason beside it in the source, or on the line above:

    __threadfence();  // sync: orders the result before the flag, which this simulator cannot see
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cases import Case
from .launch import Launch, SimError
from .program import Program
from .ptx import Instruction, Kernel, Module

_SYNCHRONISATION = re.compile(
    r"bar\.(warp\.)?(sync|arrive)|barrier\.(?!.*\bred\b)|cp\.async\.(bulk\.)?wait|wgmma\.(wait_group|fence)"
    r"|mbarrier\.(arrive|try_wait|test_wait)|fence|membar"
)
_MBARRIER_WAIT = re.compile(r"mbarrier\.\w+_wait\S*\s+([^\s,]+),")
_EXCUSE = re.compile(r"//\s*sync:\s*(.+?)\s*$")


def synchronisations(kernel: Kernel) -> list[list[Instruction]]:
    """Those of the CUDA source, as the copies that there are of each."""
    groups: dict[tuple[object, ...], list[Instruction]] = {}
    for ins in kernel.code:
        if _SYNCHRONISATION.match(ins.op):
            groups.setdefault((ins.op, ins.source or ins.line), []).append(ins)
    return list(groups.values())


def sync_mutants(module: Module, kernel: Kernel) -> Iterator[tuple[list[Instruction], str]]:
    """For every synchronisation of a kernel its instructions, of which loops may have several copies, and the kernel's
    module without them and without its other kernels, as text. A wait for an mbarrier succeeds at once."""
    alone = _alone(module, kernel)
    for copies in synchronisations(kernel):
        text = alone
        for ins in copies:
            text = _without(text, ins)
        yield copies, text


def _alone(module: Module, kernel: Kernel) -> str:
    """Lines keep their numbers."""
    lines = module.text.split("\n")
    for other in module.kernels.values():
        if other is not kernel:
            first, last = other.lines
            lines[first - 1 : last] = [""] * (last + 1 - first)
    return "\n".join(lines)


def _without(text: str, ins: Instruction) -> str:
    """Lines keep their numbers."""
    start = 0
    for _ in range(ins.line - 1):
        start = text.index("\n", start) + 1
    guard, statement = (r"@!?\S+\s+" if ins.guard else ""), re.escape(ins.op) + r"[^;]*;"
    found = re.compile(f"({guard})({statement})").search(text, start)
    assert found is not None, (ins.line, ins.text)
    wait = _MBARRIER_WAIT.match(found.group(2))
    replacement = f"{found.group(1)}setp.eq.u32 {wait.group(1)}, 0, 0;" if wait else ""
    return text[: found.start()] + replacement + "\n" * found.group().count("\n") + text[found.end() :]


@dataclass(frozen=True)
class Verdict:
    """On one mutant."""

    instruction: str
    source: str  # its lines in the CUDA source: where it is, and where that was inlined
    noticed: str  # by which hazard, error or wrong result; empty: it survived
    excuse: str  # the comment in the source
    executed: bool

    @property
    def survived(self) -> bool:
        return not self.noticed and not self.excuse

    @property
    def outcome(self) -> str:
        return "caught" if self.noticed else "excused" if self.excuse else "SURVIVED"

    @property
    def reason(self) -> str:
        return self.noticed or self.excuse or ("nothing noticed" if self.executed else "no case executes it")


class _Mutant(Program):
    """Loops that no longer end are stopped early."""

    max_steps: int

    def launch(self, *args: Any, **options: Any) -> Launch:
        return super().launch(*args, **{"max_steps": self.max_steps, **options})


def judge(cases: Sequence[Case]) -> Iterator[Verdict]:
    """Drops each synchronisation of a kernel in turn, and runs those of its cases that execute it until one notices.
    Raises if the whole kernel fails a case."""
    program = cases[0].program()
    kernel = program.find(cases[0].kernel)
    launches = [(case, case.run(program).clean()) for case in cases]
    unexecuted = [{line for line, _ in launch.unexecuted()} for _, launch in launches]
    for copies, text in sync_mutants(program.module, kernel):
        lines = {ins.line for ins in copies}
        reaching = [each for each, missed in zip(launches, unexecuted, strict=True) if lines - missed]
        noticed = ""
        if reaching:
            mutant = _Mutant(text)
            for case, launch in reaching:
                mutant.max_steps = 10 * launch.turns + 1000
                if noticed := _noticed(case, mutant):
                    break
        source = _source(program.module, copies[0])
        yield Verdict(copies[0].text, _short(source), noticed, _excuse(source), bool(reaching))


def _noticed(case: Case, mutant: Program) -> str:
    try:
        case.run(mutant).clean()
    except SimError as error:
        first, *rest = str(error).split("\n")
        summary = rest[0] if first.endswith("hazards") else first.partition(": ")[2]
        return re.split(r" at address | by block | \(", summary)[0]
    except AssertionError as error:
        return "wrong result: " + (str(error).strip().split("\n")[0] or "an assertion failed")
    return ""


def _source(module: Module, ins: Instruction) -> list[tuple[Path, int]]:
    """The lines of an instruction and of where it was inlined."""
    return [(Path(module.files[file]), line) for file, line in ins.source if file in module.files]


def _short(source: Sequence[tuple[Path, int]]) -> str:
    parts, last = [], ""
    for path, line in source:
        parts.append(str(line) if path.name == last else f"{path.name}:{line}")
        last = path.name
    return " < ".join(parts)


def _excuse(source: Sequence[tuple[Path, int]]) -> str:
    for path, line in source:
        if not path.is_file():
            continue
        lines = path.read_text().split("\n")
        at = line - 1
        above = lines[at - 1].strip() if at > 0 else ""
        for text in (lines[at], above if above.startswith("//") else ""):
            if match := _EXCUSE.search(text):
                return match.group(1)
    return ""
