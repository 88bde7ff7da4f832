"""The faults: each event happens to a contender again and again, and gives one verdict each time.

An event is a context manager that prepares what its trials share (a mounted image, checkpoints to damage) and yields
the trial, a function of a random generator. What a strict contender may come to is in `allowed`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import damage
import images
import verdicts
from contents import content
from damage import Damage
from processes import Lost, Worker, Writer
from savers import Contender, Span, files, remove
from verdicts import Outcome, Verdict

Trial = Callable[[Random], Verdict]


@dataclass(frozen=True)
class Lab:
    """Where trials happen: an empty folder of a real file system, and who reads there."""

    folder: Path
    worker: Worker

    def survivors(self, contender: type[Contender], directory: Path, reported: int | None, overwrite: bool) -> Verdict:
        """What is left, and whether it can be gone on with."""
        verdict: Verdict = self.worker.call(verdicts.survivors, contender, directory, reported, overwrite)
        if verdict.outcome is Outcome.CORRECT:
            again: Verdict = self.worker.call(verdicts.resumed, contender, directory)
            if again.outcome is not Outcome.CORRECT:
                return again
        return verdict


@dataclass(frozen=True)
class Event:
    part: str
    name: str
    prepare: Callable[[type[Contender], Lab], AbstractContextManager[Trial]]
    # Of all trials of a run, in proportion to the others.
    share: int
    allowed: frozenset[Outcome] = frozenset({Outcome.CORRECT})
    filesystem: str = ""
    applies: Callable[[type[Contender]], bool] = lambda contender: True  # where it cannot happen, it is left out


# --- kill, power cut, crash clone -------------------------------------------------------------------------------------

# Several saves long, so that the instant falls anywhere in one.
_LATEST_SECONDS = 0.12


def _instant(writer: Writer, rng: Random) -> None:
    """Waits until some random instant: after a report, or now and then from the very start."""
    if rng.random() < 0.9:
        writer.wait_for(rng.randint(1, 4))
    time.sleep(rng.uniform(0, _LATEST_SECONDS))


@contextmanager
def _killed(contender: type[Contender], lab: Lab, *, overwrite: bool) -> Iterator[Trial]:
    directory = lab.folder / "run"

    def trial(rng: Random) -> Verdict:
        _wipe(directory)
        with Writer(contender, directory, overwrite=overwrite) as writer:
            _instant(writer, rng)
            writer.reported()
            reported = writer.kill()
        return lab.survivors(contender, directory, reported, overwrite)

    yield trial


@contextmanager
def _power_cut(
    contender: type[Contender], lab: Lab, *, filesystem: str, overwrite: bool, idle: bool
) -> Iterator[Trial]:
    with images.Image(lab.folder, filesystem) as image:
        directory = image.mount_point / "run"

        def trial(rng: Random) -> Verdict:
            _wipe(directory)
            image.sync()
            last = rng.randint(1, 4)
            with Writer(contender, directory, overwrite=overwrite, last=last if idle else None) as writer:
                if idle:
                    writer.wait_for(last)
                else:
                    _instant(writer, rng)
                    writer.reported()
                # Someone else's fsync, or the journal's own timer, makes names durable that have no contents yet.
                image.stop(log=rng.random() < 0.7)
                reported = writer.kill()
            image.restart()
            return lab.survivors(contender, directory, reported, overwrite)

        yield trial


@contextmanager
def _clone(contender: type[Contender], lab: Lab, *, filesystem: str) -> Iterator[Trial]:
    with images.Image(lab.folder, filesystem) as image:
        directory = image.mount_point / "run"

        def trial(rng: Random) -> Verdict:
            _wipe(directory)
            with Writer(contender, directory) as writer:
                _instant(writer, rng)
                reported = writer.reported()
                with image.clone(writer.pid) as clone:
                    return lab.survivors(contender, clone / directory.name, reported, False)

        yield trial


# --- no space ---------------------------------------------------------------------------------------------------------

_COPIES = 3
_SMALL_MEBIBYTES = 64


@contextmanager
def _full(contender: type[Contender], lab: Lab, *, filesystem: str, overwrite: bool) -> Iterator[Trial]:
    one, needed = (sum(tensor.nbytes for tensor in content(1, copies).values()) for copies in (1, _COPIES))

    def trial(rng: Random, folder: Path) -> Verdict:
        # The largest room that is too little for everybody: who overwrites in place has that of the old one as well.
        most = needed - one if overwrite else needed
        room = most - rng.randrange(64 << 10) if rng.random() < 0.3 else rng.randrange(most)
        directory = folder / "run"
        _wipe(directory)
        verdict: Verdict = lab.worker.call(verdicts.without_space, contender, directory, room, _COPIES, overwrite)
        return verdict

    if filesystem == "tmpfs":
        with images.tmpfs(lab.folder, _SMALL_MEBIBYTES) as mount_point:
            yield partial(trial, folder=mount_point)
    else:
        with images.Image(lab.folder, filesystem, _SMALL_MEBIBYTES) as image:
            yield partial(trial, folder=image.mount_point)


# --- damage -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A checkpoint to be damaged, and an older one."""

    contender: type[Contender]
    path: Path
    older: Path
    spans: list[Span]

    def file(self, rng: Random) -> Path:
        return rng.choice(files(self.path))

    def metadata(self, file: Path) -> list[tuple[int, int]]:
        """What of a file is no span."""
        return damage.outside(
            [(span.start, span.stop) for span in self.spans if span.path == file], file.stat().st_size
        )

    def touched(self, done: Damage) -> list[Span]:
        """The spans in which the change lies, or [] if it is not in spans alone."""
        if done.stop is None or any(
            start < done.stop and done.start < stop for start, stop in self.metadata(done.path)
        ):
            return []
        return [s for s in self.spans if s.path == done.path and s.start < done.stop and done.start < s.stop]


# Damages a target; None if the dice found nothing to change.
Inflict = Callable[[Target, Random], Damage | None]


def _bits_in_data(target: Target, rng: Random) -> Damage | None:
    span = rng.choice([span for span in target.spans if span.stop > span.start])
    return damage.flip_bits(span.path, span.start, span.stop, rng)


def _bits_in_metadata(target: Target, rng: Random) -> Damage | None:
    file = target.file(rng)
    if file.suffix == ".json" and rng.random() < 0.5:
        return damage.change_digit(file, rng)
    gaps = target.metadata(file)
    return damage.flip_bits(file, *rng.choice(gaps), rng) if gaps else None


def _hole(target: Target, rng: Random) -> Damage | None:
    return damage.zero_hole(target.file(rng), rng)


def _wrong_length(target: Target, rng: Random) -> Damage | None:
    return (damage.truncate if rng.random() < 0.8 else damage.extend)(target.file(rng), rng)


def _other_step(target: Target, rng: Random) -> Damage | None:
    file = rng.choice([file for file in files(target.path) if file.name != target.contender.manifest])
    return damage.replace(file, target.older / file.name)


def _stale_manifest(target: Target, rng: Random) -> Damage | None:
    name = target.contender.manifest
    return damage.replace(target.path / name, target.older / name)


def _missing(target: Target, rng: Random) -> Damage | None:
    return damage.delete(target.file(rng))


def _not_a_file(target: Target, rng: Random) -> Damage | None:
    file = target.file(rng)
    other = target.older if file == target.path else target.older / file.name
    kind = rng.randrange(4)
    if kind < 2:
        return damage.replace_by_symlink(file, file if kind == 0 else other)
    return damage.replace_by_fifo(file) if kind == 2 else damage.replace_by_directory(file)


@contextmanager
def _damaged(contender: type[Contender], lab: Lab, *, inflict: Inflict) -> Iterator[Trial]:
    directory, pristine = lab.folder / "run", lab.folder / "pristine"
    lab.worker.call(verdicts.save_steps, contender, directory, [1, 2, 3])
    path = contender.path(directory, 3)
    target = Target(contender, path, contender.path(directory, 2), contender.spans(path))
    path.rename(pristine)
    # A hung reader is told from a slow one by patience, of which those that are expected to hang get less.
    patience = 60 if contender.strict else 5

    def trial(rng: Random) -> Verdict:
        done = None
        while done is None:
            remove(path)
            if pristine.is_dir():
                shutil.copytree(pristine, path)
            else:
                shutil.copyfile(pristine, path)
            done = inflict(target, rng)
        verdict: Verdict = lab.worker.call(
            verdicts.damaged, contender, directory, 3, done, target.touched(done), timeout=patience
        )
        return verdict

    yield trial


def _wipe(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


# --- all of them ------------------------------------------------------------------------------------------------------


def _any(contender: type[Contender]) -> bool:
    return contender.own_files


def _several(contender: type[Contender]) -> bool:
    """A checkpoint is several files, of which one describes the others."""
    return contender.own_files and bool(contender.manifest)


def _kill(when: str, overwrite: bool, share: int) -> Event:
    return Event("kill", f"kill -9 {when}", partial(_killed, overwrite=overwrite), share)


def _cut(when: str, filesystem: str, share: int, *, overwrite: bool = False, idle: bool = False) -> Event:
    prepare = partial(_power_cut, filesystem=filesystem, overwrite=overwrite, idle=idle)
    return Event("power", f"power cut {when}, {filesystem}", prepare, share, filesystem=filesystem)


def _copy(filesystem: str, share: int) -> Event:
    prepare = partial(_clone, filesystem=filesystem)
    return Event("clone", f"crash clone while saving, {filesystem}", prepare, share, filesystem=filesystem)


def _no_space(when: str, filesystem: str, overwrite: bool, share: int) -> Event:
    prepare = partial(_full, filesystem=filesystem, overwrite=overwrite)
    return Event("enospc", f"disk full {when}, {filesystem}", prepare, share, frozenset({Outcome.REFUSED}), filesystem)


def _damage(name: str, inflict: Inflict, share: int, applies: Callable[[type[Contender]], bool] = _any) -> Event:
    # Correct as well: what was damaged may be padding that nobody reads.
    allowed = frozenset({Outcome.CORRECT, Outcome.REFUSED})
    return Event("damage", name, partial(_damaged, inflict=inflict), share, allowed, applies=applies)


EVENTS: list[Event] = [
    _kill("while saving", False, 150),
    _kill("while overwriting", True, 150),
    _cut("while saving", "ext4", 60),
    _cut("while saving", "xfs", 60),
    _cut("while overwriting", "ext4", 60, overwrite=True),
    _cut("while overwriting", "xfs", 60, overwrite=True),
    _cut("after a save was reported", "ext4", 30, idle=True),
    _cut("after a save was reported", "xfs", 30, idle=True),
    _copy("ext4", 50),
    _copy("xfs", 50),
    _no_space("while saving", "tmpfs", False, 40),
    _no_space("while saving", "ext4", False, 40),
    _no_space("while overwriting", "tmpfs", True, 40),
    _no_space("while overwriting", "ext4", True, 40),
    _damage("bits flipped in data", _bits_in_data, 400),
    _damage("bits flipped in metadata", _bits_in_metadata, 400),
    _damage("zeroed hole of 4 to 64 KiB", _hole, 250),
    _damage("truncated or extended", _wrong_length, 250),
    _damage("data file of another step", _other_step, 50, _several),
    _damage("manifest of another step", _stale_manifest, 50, _several),
    _damage("a file deleted", _missing, 50, _several),
    _damage("a link, fifo or directory for a file", _not_a_file, 100),
]


def why_not(event: Event) -> str:
    return images.why_not(event.filesystem) if event.filesystem else ""


def happen(trial: Trial, rng: Random) -> Verdict:
    try:
        return trial(rng)
    except Lost as lost:
        return Verdict(Outcome.BROKEN, str(lost))
