"""What kernels cost, as a table: a row for each kernel, from declared cases or from a file of SIMGPU_COUNTERS."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import static
from .cases import Case

_HEADINGS = (
    *("kernel", "registers", "spills"),
    *("load bytes", "sectors", "use", "store bytes", "sectors", "use", "bulk bytes"),
    *("conflicts", "mma", "instructions", "per element"),
)


@dataclass
class Cost:
    load_bytes: int = 0
    load_sectors: int = 0
    store_bytes: int = 0
    store_sectors: int = 0
    bulk_bytes: int = 0
    conflicts: int = 0
    mma: int = 0
    instructions: int = 0  # of threads

    def add(self, totals: Mapping[str, Any]) -> None:
        """pre: the totals of a launch."""
        for kind, count in totals["global"].items():
            if kind in ("load", "cp.async"):
                self.load_bytes += count["bytes"]
                self.load_sectors += count["sectors"]
            elif kind == "store":
                self.store_bytes += count["bytes"]
                self.store_sectors += count["sectors"]
        self.bulk_bytes += totals["bulk_bytes"]
        self.conflicts += sum(count["conflicts"] for count in totals["shared"].values())
        self.mma += totals["mma"]
        self.instructions += totals["thread_instructions"]


def of_cases(cases: Iterable[Case]) -> str:
    rows = []
    for case in cases:
        cost = Cost()
        cost.add(case.run(case.program()).totals)
        kernel = case.program().find(case.kernel).name
        resources = _resources(case.source, case.arch, case.flags).get(kernel)
        registers, spills = (
            (str(resources.registers), str(resources.spill_stores + resources.spill_loads)) if resources else ("-", "-")
        )
        rows.append(_row(kernel, cost, registers, spills, f"{cost.instructions / case.elements:.2f}"))
    return table(_HEADINGS, rows)


def of_counters(path: str | Path, names: Sequence[str]) -> str:
    """Sums of all launches of a kernel, of those whose name has one of `names` as a part, if there are any."""
    costs: dict[str, Cost] = {}
    for line in Path(path).read_text().splitlines():
        launch = json.loads(line)
        if names and not any(name in launch["kernel"] for name in names):
            continue
        costs.setdefault(launch["kernel"], Cost()).add(launch["totals"])
    return table(_HEADINGS, [_row(kernel, cost, "-", "-", "-") for kernel, cost in costs.items()])


@cache
def _resources(source: Path, arch: str, flags: tuple[str, ...]) -> dict[str, static.Resources]:
    return static.resources(source, arch, flags) if shutil.which("nvcc") else {}


def _row(kernel: str, cost: Cost, registers: str, spills: str, per_element: str) -> list[str]:
    def use(moved: int, sectors: int) -> str:
        return f"{moved / (32 * sectors):.2f}" if sectors else "-"

    return [
        kernel,
        registers,
        spills,
        str(cost.load_bytes),
        str(cost.load_sectors),
        use(cost.load_bytes, cost.load_sectors),
        str(cost.store_bytes),
        str(cost.store_sectors),
        use(cost.store_bytes, cost.store_sectors),
        str(cost.bulk_bytes),
        str(cost.conflicts),
        str(cost.mma),
        str(cost.instructions),
        per_element,
    ]


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: numbers to the right, words to the left."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    numeric = [all(row[column][:1].isdigit() or row[column] == "-" for row in rows) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, rows)])
