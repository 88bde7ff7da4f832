"""What became of a directory of checkpoints after a fault: functions that look at it and say so in one of few words.

They run in a Worker. The same rules hold for every contender; a strict one must also leave nothing that does not load,
and say what is damaged.
"""

from __future__ import annotations

import enum
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import narrowgauge as ng
from contents import content, difference
from damage import Damage
from savers import Contender, Span, files


class Outcome(enum.Enum):
    CORRECT = "correct"
    REFUSED = "error raised"
    ROLLED_BACK = "a reported save lost"
    PREVIOUS_LOST = "previous lost"
    NOTHING = "nothing loads"
    WRONG = "WRONG DATA, no error"
    UNREPORTED = "failed save not reported"
    UNCLEAR = "unclear error"
    STUCK = "cannot save again"
    BROKEN = "hung, died or failed by itself"


class Verdict(NamedTuple):
    outcome: Outcome
    detail: str = ""
    # The fault came in the middle of a save: something unfinished was left.
    midway: bool = False


def survivors(contender: type[Contender], directory: Path, reported: int | None, overwritten: bool) -> Verdict:
    """Loads from the newest name down until one loads: the way a job resumes.

    `reported` is the last number of which the writer said that it is safe. The number is the step, unless the one step
    was `overwritten`.
    """
    steps = contender.steps(directory)
    midway = bool(contender.leftovers(directory)) or bool(steps and steps[-1] > (reported or 0) and not overwritten)
    found, refused = None, []
    for step in reversed(steps):
        try:
            state = contender.load(directory, step)
        except Exception as error:
            refused.append(f"step {step}: {_describe(error)}")
            continue
        number = int(state["number"]) if overwritten else step
        wrong = difference(state, number)
        if wrong:
            return Verdict(Outcome.WRONG, f"step {step}: {wrong}", midway)
        if found is None:
            found = number
        if not contender.strict:
            break
    detail = "; ".join(refused)
    if found is None:
        if reported is None:
            return Verdict(Outcome.REFUSED if steps else Outcome.CORRECT, detail, midway)
        return Verdict(Outcome.NOTHING, f"reported {reported}; {detail or 'there is no name'}", midway)
    if found < (reported or 0):
        return Verdict(Outcome.ROLLED_BACK, f"reported {reported}, the newest that loads is {found}; {detail}", midway)
    return Verdict(Outcome.REFUSED if refused else Outcome.CORRECT, detail, midway)


def resumed(contender: type[Contender], directory: Path) -> Verdict:
    """Opens the directory again and saves one more step."""
    step = max(contender.steps(directory), default=0) + 1
    try:
        saver = contender(directory)
        try:
            saver.save(step, content(step))
        finally:
            saver.close()
    except Exception as error:
        return Verdict(Outcome.STUCK, _describe(error))
    return _clean(contender, directory, step)


def damaged(contender: type[Contender], directory: Path, step: int, damage: Damage, touched: Sequence[Span]) -> Verdict:
    """Loads a damaged checkpoint and the one before. `touched`: the spans that changed, if nothing else did."""
    verdict = _damaged(contender, directory, step, damage, touched)
    try:
        wrong = difference(contender.load(directory, step - 1), step - 1)
    except Exception as error:
        wrong = _describe(error)
    if wrong:
        return Verdict(Outcome.PREVIOUS_LOST, f"{damage}; step {step - 1}: {wrong}")
    return verdict


def _damaged(
    contender: type[Contender], directory: Path, step: int, damage: Damage, touched: Sequence[Span]
) -> Verdict:
    try:
        state = contender.load(directory, step)
    except Exception as error:
        if contender.strict:
            checked = _verify(contender, contender.path(directory, step))
            unclear = _unclear(error, damage, touched) or _unclear(checked, damage, touched)
            if unclear:
                return Verdict(Outcome.UNCLEAR, f"{damage}; {unclear}")
        return Verdict(Outcome.REFUSED, f"{damage}; {_describe(error)}")
    wrong = difference(state, step)
    if wrong:
        return Verdict(Outcome.WRONG, f"{damage}; {wrong}")
    return Verdict(Outcome.CORRECT, str(damage))


def _verify(contender: type[Contender], path: Path) -> Exception | None:
    try:
        contender.verify(path)
    except Exception as error:
        return error
    return None


def _unclear(error: Exception | None, damage: Damage, touched: Sequence[Span]) -> str:
    """What an error lacks: it is of the kinds that are promised, and names the file, and of data tensor and chunk."""
    if error is None:
        return "the check passes, though loading raises"
    if not isinstance(error, (ng.FileCorrupt, OSError)):
        return f"unexpected kind: {_describe(error)}"
    message = str(error)
    blamed = files(damage.path.parent) if damage.foreign else [damage.path]
    if not any(path.name in message for path in blamed):
        return f"does not name {damage.path.name}: {_describe(error)}"
    named = (span.tensor in message and re.search(rf"chunk {span.chunk}\b", message) for span in touched)
    if touched and not any(named):
        first = touched[0]
        return f"does not name {first.tensor}, chunk {first.chunk}: {_describe(error)}"
    return ""


def without_space(contender: type[Contender], directory: Path, room: int, copies: int, overwrite: bool) -> Verdict:
    """A save of step 2 (or again of step 1) that needs more than the `room` bytes that the file system has left."""
    filler = directory.parent / "filler"
    saver = contender(directory)
    try:
        saver.save(1, content(1))
        _fill(filler, room)
        try:
            saver.save(1 if overwrite else 2, content(2, copies))
        except Exception as error:
            verdict = survivors(contender, directory, 1, overwrite)
            if verdict.outcome is Outcome.NOTHING:
                verdict = Verdict(Outcome.PREVIOUS_LOST, verdict.detail)
            elif verdict.outcome is Outcome.CORRECT:
                verdict = Verdict(Outcome.REFUSED, _describe(error))
            elif verdict.outcome is Outcome.REFUSED and contender.strict:
                verdict = Verdict(Outcome.UNCLEAR, f"what failed is left under its name: {verdict.detail}")
            if contender.strict and getattr(error, "errno", None) != errno.ENOSPC:
                verdict = Verdict(Outcome.UNCLEAR, f"not OSError with ENOSPC: {_describe(error)}")
        else:
            verdict = Verdict(Outcome.UNREPORTED, f"{room} bytes were free")
        filler.unlink()
        if verdict.outcome is Outcome.REFUSED:
            try:
                saver.save(3, content(3))
            except Exception as error:
                return Verdict(Outcome.STUCK, _describe(error))
            again = _clean(contender, directory, 3)
            return verdict if again.outcome is Outcome.CORRECT else again
        return verdict
    finally:
        saver.close()


def save_steps(contender: type[Contender], directory: Path, steps: Sequence[int]) -> None:
    saver = contender(directory)
    for step in steps:
        saver.save(step, content(step))
    saver.close()


def _clean(contender: type[Contender], directory: Path, step: int) -> Verdict:
    """The newest is `step`, loads, and a strict contender has left nothing else."""
    try:
        wrong = difference(contender.load(directory, step), step)
    except Exception as error:
        wrong = _describe(error)
    if not wrong and contender.strict and contender.leftovers(directory):
        wrong = f"leftovers: {contender.leftovers(directory)}"
    return Verdict(Outcome.STUCK, f"after one more save: {wrong}") if wrong else Verdict(Outcome.CORRECT)


def _fill(filler: Path, room: int) -> None:
    """Takes all space of the file system but `room` bytes."""
    with filler.open("wb") as file:
        os.fsync(file.fileno())
        status = os.statvfs(filler)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - room)
        os.fsync(file.fileno())


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
