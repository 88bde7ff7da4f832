"""The faults: each event happens to a contender again and again, and gives one verdict each time.

An event is a context manager that prepares what its trials share (a mounted image, checkpoints to damage) and yields the
trial, a function of a random generator. The worst that a strict contender may give is in `allowed`.
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
from typing import Protocol

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
    applies: Callable[[type[Contender]], bool] = lambda contender: True


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


class Inflict(Protocol):
    """Damages the checkpoint at `path`; None if the dice found nothing to change. `older`: another checkpoint."""

    def __call__(
        self, contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random
    ) -> Damage | None: ...


def _bits_in_data(contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random) -> Damage | None:
    span = rng.choice([span for span in spans if span.stop > span.start])
    return damage.flip_bits(span.path, span.start, span.stop, rng)


def _bits_in_metadata(
    contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random
) -> Damage | None:
    file = rng.choice(files(path))
    if contender.manifest.endswith(".json") and file.name == contender.manifest and rng.random() < 0.5:
        return damage.change_digit(file, rng)
    gaps = _metadata(file, spans)
    return damage.flip_bits(file, *rng.choice(gaps), rng) if gaps else None


def _hole(contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random) -> Damage | None:
    return damage.zero_hole(rng.choice(files(path)), rng)


def _wrong_length(contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random) -> Damage | None:
    file = rng.choice(files(path))
    return damage.truncate(file, rng) if rng.random() < 0.8 else damage.extend(file, rng)


def _other_step(contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random) -> Damage | None:
    file = rng.choice([file for file in files(path) if file.name != contender.manifest])
    return damage.replace(file, older / file.name)


def _stale_manifest(
    contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random
) -> Damage | None:
    return damage.replace(path / contender.manifest, older / contender.manifest)


def _missing(contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random) -> Damage | None:
    return damage.delete(rng.choice(files(path)))


def _not_a_file(contender: type[Contender], path: Path, older: Path, spans: list[Span], rng: Random) -> Damage | None:
    file = rng.choice(files(path))
    kind = rng.randrange(4)
    if kind == 0:
        return damage.replace_by_symlink(file, older / file.name if path.is_dir() else older)
    if kind == 1:
        return damage.replace_by_symlink(file, file)
    return damage.replace_by_fifo(file) if kind == 2 else damage.replace_by_directory(file)


@contextmanager
def _damaged(contender: type[Contender], lab: Lab, *, inflict: Inflict) -> Iterator[Trial]:
    directory, pristine = lab.folder / "run", lab.folder / "pristine"
    lab.worker.call(verdicts.save_steps, contender, directory, [1, 2, 3])
    path, older = contender.path(directory, 3), contender.path(directory, 2)
    spans = contender.spans(path)
    path.rename(pristine)

    def trial(rng: Random) -> Verdict:
        while True:
            remove(path)
            if pristine.is_dir():
                shutil.copytree(pristine, path)
            else:
                shutil.copyfile(pristine, path)
            done = inflict(contender, path, older, spans, rng)
            if done:
                break
        # A hung reader is told from a slow one by patience, of which those that hang by design get less.
        patience = 60 if contender.strict else 5
        touched, metadata = _touched(done, spans)
        verdict: Verdict = lab.worker.call(
            verdicts.damaged, contender, directory, 3, done, touched, metadata, timeout=patience
        )
        return verdict

    yield trial


def _metadata(file: Path, spans: list[Span]) -> list[tuple[int, int]]:
    return damage.outside([(span.start, span.stop) for span in spans if span.path == file], file.stat().st_size)


def _touched(done: Damage, spans: list[Span]) -> tuple[list[Span], bool]:
    """The spans that a change in place touched, and whether it touched bytes of no span as well."""
    if done.stop is None:
        return [], True
    touched = [s for s in spans if s.path == done.path and s.start < done.stop and done.start < s.stop]
    gaps = _metadata(done.path, spans)
    return touched, any(start < done.stop and done.start < stop for start, stop in gaps)


def _wipe(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


# --- all of them ------------------------------------------------------------------------------------------------------

_DAMAGE_ALLOWED = frozenset({Outcome.CORRECT, Outcome.REFUSED})
_FULL_ALLOWED = frozenset({Outcome.REFUSED})


def _many(contender: type[Contender]) -> bool:
    """A checkpoint of several files."""
    return bool(contender.manifest)


def _damage(name: str, inflict: Inflict, share: int, applies: Callable[[type[Contender]], bool] | None = None) -> Event:
    prepare = partial(_damaged, inflict=inflict)
    return Event("damage", name, prepare, share, _DAMAGE_ALLOWED, applies=applies or (lambda contender: True))


EVENTS: list[Event] = [
    Event("kill", "kill -9 while saving", partial(_killed, overwrite=False), 150),
    Event("kill", "kill -9 while overwriting", partial(_killed, overwrite=True), 150),
    *(
        Event("power", f"power cut {when}, {filesystem}", partial(_power_cut, filesystem=filesystem, **how), share,
              filesystem=filesystem)
        for when, how, share in (
            ("while saving", {"overwrite": False, "idle": False}, 60),
            ("while overwriting", {"overwrite": True, "idle": False}, 60),
            ("after a save was reported", {"overwrite": False, "idle": True}, 30),
        )
        for filesystem in ("ext4", "xfs")
    ),
    *(
        Event("clone", f"crash clone while saving, {filesystem}", partial(_clone, filesystem=filesystem), 50,
              filesystem=filesystem)
        for filesystem in ("ext4", "xfs")
    ),
    *(
        Event("enospc", f"disk full while {'overwriting' if overwrite else 'saving'}, {filesystem}",
              partial(_full, filesystem=filesystem, overwrite=overwrite), 40, _FULL_ALLOWED, filesystem)
        for overwrite in (False, True)
        for filesystem in ("tmpfs", "ext4")
    ),
    _damage("bits flipped in data", _bits_in_data, 250),
    _damage("bits flipped in metadata", _bits_in_metadata, 250),
    _damage("zeroed hole of 4 to 64 KiB", _hole, 150),
    _damage("truncated or extended", _wrong_length, 150),
    _damage("data file of another step", _other_step, 50, _many),
    _damage("manifest of another step", _stale_manifest, 50, _many),
    _damage("a file deleted", _missing, 50, _many),
    _damage("a link, fifo or directory for a file", _not_a_file, 100),
]  # fmt: skip


def why_not(event: Event) -> str:
    return images.why_not(event.filesystem) if event.filesystem else ""


def happen(trial: Trial, rng: Random) -> Verdict:
    try:
        return trial(rng)
    except Lost as lost:
        return Verdict(Outcome.LOST, str(lost))
