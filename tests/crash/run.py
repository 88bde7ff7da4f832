"""Is anything lost? Injects faults into saves and into what they leave, and counts what becomes of the checkpoints.

    python tests/crash/run.py                           # 2500 faults; about ten minutes on two cores
    python tests/crash/run.py --peers --table out.md    # the same events for torch.save, safetensors and DCP
    python tests/crash/run.py --only power,clone --faults 500 --seed 7

Parts: enumerate (every legal crash state of a small save, by the C++ fault backend), kill (kill -9 at random instants),
power (ext4 and xfs images shut down by FS_IOC_SHUTDOWN), clone (images copied while they are written), enospc (no space
on tmpfs and ext4), damage (bits, lengths, holes, files of other steps). Parts that mount need root on Linux and are
skipped elsewhere, with the reason.

The invariant: the newest checkpoint that was reported safe loads bit for bit; a damaged one raises an error that names
file, tensor and chunk; the one before still loads. The exit code is 1 if narrowgauge broke it.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

from events import EVENTS, Event, Lab, happen, why_not
from images import hide_mounts
from processes import Worker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from savers import OURS, PEERS, Contender
from verdicts import Verdict

PARTS = ["enumerate", "kill", "power", "clone", "enospc", "damage"]
PEER_TRIALS = 30  # of each event
_ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    event: Event
    contender: type[Contender]
    trial: int
    verdict: Verdict

    @property
    def violation(self) -> bool:
        return self.contender.strict and self.verdict.outcome not in self.event.allowed


class Enumeration(NamedTuple):
    faults: int
    violations: int
    output: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=2500, help="trials for narrowgauge, beside the enumerated ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--trial", type=int, help="only this trial of each event: to repeat one that failed")
    parser.add_argument("--peers", action="store_true", help=f"also the peers, {PEER_TRIALS} trials of each event")
    parser.add_argument("--table", type=Path, help="write the table to this file as well")
    parser.add_argument("--enumerator", type=Path, default=_ROOT / "build/release/tests/crash/narrowgauge_crash")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)

    if any(event.part in args.only and event.filesystem and not why_not(event) for event in EVENTS):
        hide_mounts()

    start = time.monotonic()
    console = Console(stderr=True)
    enumeration = enumerate_states(args.enumerator, console) if "enumerate" in args.only else None
    contenders = [*OURS, *(PEERS if args.peers else [])]
    results: list[Result] = []
    interrupted = False
    try:
        inject(args, contenders, results, console)
    except SystemExit:
        interrupted = True  # what was found until now is worth printing

    lines = table(results, contenders, enumeration)
    print("\n".join(lines))
    if args.table:
        args.table.write_text("\n".join(lines) + "\n")
    ours = [result for result in results if result.contender in OURS]
    violations = [result for result in ours if result.violation]
    for event, contender, trial, verdict in violations:
        print(f"\nVIOLATION: {contender.name}: {event.name}: {verdict.outcome.value}: {verdict.detail}")
        print(f"  again: python tests/crash/run.py --only {event.part} --seed {args.seed} --trial {trial}")
    if enumeration and enumeration.violations:
        print(f"\nVIOLATION: {args.enumerator}:\n{enumeration.output}")
    faults = len(ours) + (enumeration.faults if enumeration else 0)
    broken = len(violations) + (enumeration.violations if enumeration else 0)
    midway = sum(result.verdict.midway for result in ours)
    print(f"\nfaults: {faults}, violations: {broken} (seed {args.seed}, {time.monotonic() - start:.0f} s;", end=" ")
    print(f"{midway} kills, cuts and clones fell into the middle of a save){', interrupted' if interrupted else ''}")
    return 1 if broken else 130 if interrupted else 0


def enumerate_states(enumerator: Path, console: Console) -> Enumeration | None:
    if not enumerator.is_file():
        console.print(f"skipped: enumerate: {enumerator} is not built")
        return None
    done = subprocess.run([enumerator], capture_output=True, text=True, check=False)
    summary = re.search(r"faults: (\d+), violations: (\d+)", done.stdout)
    if not summary or (done.returncode != 0 and summary[2] == "0"):
        return Enumeration(0, 1, f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return Enumeration(int(summary[1]), int(summary[2]), done.stdout + done.stderr)


def inject(
    args: argparse.Namespace, contenders: list[type[Contender]], results: list[Result], console: Console
) -> None:
    shares = sum(event.share for event in EVENTS)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        tempfile.TemporaryDirectory(prefix="narrowgauge-crash-") as temporary,
        Worker() as worker,
        Progress(*columns, console=console) as progress,
    ):
        for number, event in enumerate(EVENTS):
            if event.part not in args.only:
                continue
            reason = why_not(event)
            if reason:
                progress.console.print(f"skipped: {event.name}: {reason}")
                continue
            for contender in contenders:
                if not event.applies(contender):
                    continue
                ours = round(args.faults * event.share / shares / sum(map(event.applies, OURS)))
                trials = max(1, ours) if contender in OURS else PEER_TRIALS
                folder = Path(temporary).resolve() / f"{number}-{contender.__name__}"
                folder.mkdir()
                chosen = range(trials) if args.trial is None else [args.trial]
                bar = progress.add_task(f"{contender.name}: {event.name}", total=len(chosen))
                with event.prepare(contender, Lab(folder, worker)) as trial:
                    for index in chosen:
                        rng = Random(f"{args.seed} {event.name} {index}")
                        results.append(Result(event, contender, index, happen(trial, rng)))
                        progress.advance(bar)


def table(results: list[Result], contenders: list[type[Contender]], enumeration: Enumeration | None) -> list[str]:
    """Markdown: a row for each event that happened, a column for each contender, how often it came to what."""
    counts: dict[tuple[str, type[Contender]], Counter[str]] = {}
    for result in results:
        counts.setdefault((result.event.name, result.contender), Counter())[result.verdict.outcome.value] += 1
    rows = [["event", *(contender.name for contender in contenders)]]
    if enumeration:
        cell = f"{enumeration.faults - enumeration.violations} correct"
        if enumeration.violations:
            cell += f", {enumeration.violations} VIOLATIONS"
        rows.append(["every legal crash state of a small save", cell, *("" for _ in contenders[1:])])
    for event in EVENTS:
        cells = [
            ", ".join(
                f"{count} {outcome}" for outcome, count in counts.get((event.name, contender), Counter()).most_common()
            )
            for contender in contenders
        ]
        if any(cells):
            rows.append([event.name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def _stop(number: int, frame: object) -> None:
    """Mounts and loop devices are undone on the way out, which a second signal must not cut short."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
