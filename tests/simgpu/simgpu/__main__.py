"""python -m simgpu mutate CASES.py [KERNEL...]            drops every synchronisation in turn: what notices?
python -m simgpu report CASES.py|COUNTERS [KERNEL...]   what kernels cost

CASES.py declares runs of kernels, see simgpu/cases.py; COUNTERS is a file that SIMGPU_COUNTERS named. A KERNEL is a
part of a name. mutate fails if a synchronisation can be dropped unnoticed and no comment `// sync: why` stands beside
it; one that a case does not reach may be caught by another case that inlines the same lines.
"""

from __future__ import annotations

import sys

from . import report
from .cases import Case, load_cases
from .mutants import judge


def _mutate(cases: list[Case]) -> int:
    verdicts = [(case.kernel, verdict) for case in cases for verdict in judge(case)]
    # Kernels share source: what one case does not reach, another may.
    caught = {(verdict.source, verdict.instruction) for _, verdict in verdicts if verdict.noticed}
    rows, survivors = [], 0
    for kernel, verdict in verdicts:
        elsewhere = verdict.survived and not verdict.executed and (verdict.source, verdict.instruction) in caught
        survivors += verdict.survived and not elsewhere
        outcome, reason = ("elsewhere", "caught in another kernel") if elsewhere else (verdict.outcome, verdict.reason)
        rows.append([outcome, kernel, verdict.source, verdict.instruction, reason])
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
