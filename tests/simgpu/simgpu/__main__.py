"""python -m simgpu mutate CASES.py [KERNEL...]            drops every synchronisation in turn: what notices?
python -m simgpu report CASES.py|COUNTERS [KERNEL...]   what kernels cost

CASES.py declares runs of kernels, see simgpu/cases.py; COUNTERS is a file that SIMGPU_COUNTERS named. A KERNEL is a
part of a name. mutate fails if a synchronisation can be dropped unnoticed and no comment `// sync: why` stands beside
it.
"""

from __future__ import annotations

import sys

from . import report
from .cases import Case, load_cases
from .mutants import judge


def _mutate(cases: list[Case]) -> int:
    rows, survivors = [], 0
    for case in cases:
        for verdict in judge(case):
            survivors += verdict.survived
            rows.append([verdict.outcome, case.kernel, verdict.source, verdict.instruction, verdict.reason])
    print(report.table(("outcome", "kernel", "source", "without", "reason"), rows))
    print(f"\n{len(rows)} synchronisations of {len(cases)} kernels, {survivors} can be dropped unnoticed")
    return 1 if survivors else 0


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in ("mutate", "report"):
        print(__doc__, file=sys.stderr)
        return 2
    command, path, *names = arguments
    if command == "report" and not path.endswith(".py"):
        print(report.of_counters(path, names))
        return 0
    cases = [case for case in load_cases(path) if not names or any(name in case.kernel for name in names)]
    if not cases:
        print(f"{path} has no case of {' or '.join(names) or 'any kernel'}", file=sys.stderr)
        return 2
    if command == "mutate":
        return _mutate(cases)
    print(report.of_cases(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
