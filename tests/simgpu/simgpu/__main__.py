"""python -m simgpu mutate CASES.py [KERNEL...]            drops every synchronisation in turn: what notices?
python -m simgpu report CASES.py|COUNTERS [KERNEL...]   what kernels cost

CASES.py declares runs of kernels, see simgpu/cases.py; COUNTERS is a file that SIMGPU_COUNTERS named. A KERNEL is a
part of a name. mutate fails if a synchronisation can be dropped unnoticed and no comment `// sync: why` stands beside
it. One that no case of its kernel reaches may be caught in another kernel that inlines the same lines. Without a
KERNEL, kernels of the same sources that synchronise and have no case are failures too.
"""

from __future__ import annotations

import sys

from . import report
from .cases import Case, load_cases
from .mutants import judge, synchronisations


def _mutate(cases: list[Case], every: bool) -> int:
    """every: these are all cases of the file."""
    kernels: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        kernels.setdefault((case.source, case.arch, case.flags, case.kernel), []).append(case)
    verdicts = [(own[0].kernel, verdict) for own in kernels.values() for verdict in judge(own)]
    # Kernels share source: what the cases of one do not reach, those of another may.
    caught = {(verdict.source, verdict.instruction) for _, verdict in verdicts if verdict.noticed}
    rows, survivors = [], 0
    for kernel, verdict in verdicts:
        elsewhere = verdict.survived and not verdict.executed and (verdict.source, verdict.instruction) in caught
        survivors += verdict.survived and not elsewhere
        outcome, reason = ("elsewhere", "caught in another kernel") if elsewhere else (verdict.outcome, verdict.reason)
        rows.append([outcome, kernel, verdict.source, verdict.instruction, reason])
    print(report.table(("outcome", "kernel", "source", "without", "reason"), rows))
    named = {kernel for *_, kernel in kernels}
    missing = sorted(name for name in _synchronising(cases) if name not in named) if every else []
    for name in missing:
        print(f"\n{name} synchronises and has no case")
    print(f"\n{len(rows)} synchronisations of {len(kernels)} kernels, {survivors} can be dropped unnoticed")
    return 1 if survivors or missing else 0


def _synchronising(cases: list[Case]) -> set[str]:
    """The kernels with synchronisations in the programs of these cases."""
    modules = {id(module): module for module in (case.program().module for case in cases)}.values()
    return {kernel.name for module in modules for kernel in module.kernels.values() if synchronisations(kernel)}


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
        return _mutate(cases, every=not names)
    print(report.of_cases(cases))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
