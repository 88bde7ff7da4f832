"""A fast selection of tests/crash: damage and kills for narrowgauge, and proof that the harness sees what is lost.

The long run is python tests/crash/run.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).parents[1] / "crash"))

import contents
import damage
import events
import verdicts
from savers import Contender, Dcp, Narrowgauge, Safetensors, TorchSave
from verdicts import Outcome, Verdict

EVENTS = {event.name: event for event in events.EVENTS}


class Here:
    """A Worker that is this process: the contenders of this file neither hang nor crash."""

    def call(self, function, *arguments, timeout=None):
        return function(*arguments)


def happen(name: str, contender: type[Contender], folder: Path, trials: int) -> list[Verdict]:
    event = EVENTS[name]
    reason = events.why_not(event)
    if reason:
        pytest.skip(f"{name}: {reason}")
    with event.prepare(contender, events.Lab(folder, Here())) as trial:
        return [events.happen(trial, Random(f"{name} {index}")) for index in range(trials)]


def outcomes(verdicts: list[Verdict]) -> set[Outcome]:
    return {verdict.outcome for verdict in verdicts}


# --- narrowgauge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [event.name for event in events.EVENTS if event.part == "damage"])
def test_damage_is_refused_by_name(name, tmp_path):
    bad = [v for v in happen(name, Narrowgauge, tmp_path, 20) if v.outcome not in EVENTS[name].allowed]
    assert not bad


@pytest.mark.parametrize(
    ("name", "trials"),
    [
        ("kill -9 while saving", 5),
        ("kill -9 while overwriting", 5),
        ("power cut while saving, ext4", 2),
        ("power cut after a save was reported, ext4", 1),
        ("disk full while saving, tmpfs", 3),
    ],
)
def test_nothing_is_lost(name, trials, tmp_path):
    bad = [v for v in happen(name, Narrowgauge, tmp_path, trials) if v.outcome not in EVENTS[name].allowed]
    assert not bad


# --- the harness can fail ---------------------------------------------------------------------------------------------


class Demanding(TorchSave):
    """torch.save, from which is asked what is asked from narrowgauge."""

    strict = True


def test_what_does_not_sync_is_lost(tmp_path):
    name = "power cut after a save was reported, ext4"
    assert Outcome.CORRECT not in outcomes(happen(name, TorchSave, tmp_path, 2))


def test_what_has_no_checksums_is_wrong(tmp_path):
    assert outcomes(happen("bits flipped in data", Safetensors, tmp_path, 10)) == {Outcome.WRONG}


def test_what_writes_in_place_loses_the_previous(tmp_path):
    found = outcomes(happen("disk full while overwriting, tmpfs", TorchSave, tmp_path, 3))
    assert found == {Outcome.PREVIOUS_LOST}


def test_errors_must_name_what_is_damaged(tmp_path):
    assert outcomes(happen("truncated or extended", Demanding, tmp_path, 10)) <= {Outcome.UNCLEAR, Outcome.CORRECT}


@pytest.mark.parametrize("contender", [TorchSave, Safetensors, Dcp])
def test_spans_are_where_the_tensors_are(contender, tmp_path):
    verdicts.save_steps(contender, tmp_path, [1])
    path = contender.path(tmp_path, 1)
    spans = contender.spans(path)
    size = sum(tensor.nbytes for tensor in contents.content(1).values())
    assert size <= sum(span.stop - span.start for span in spans) < size + 16384
    metadata = damage.outside([(span.start, span.stop) for span in spans], spans[0].path.stat().st_size)
    assert all(start < stop for start, stop in metadata)


@pytest.mark.parametrize(
    ("saved", "reported", "outcome"),
    [
        ({1: 1, 2: 2}, 2, Outcome.CORRECT),
        ({1: 1, 2: 2}, None, Outcome.CORRECT),
        ({1: 1}, 2, Outcome.ROLLED_BACK),
        ({}, 1, Outcome.NOTHING),
        ({}, None, Outcome.CORRECT),
        ({1: 1, 2: 1}, 2, Outcome.WRONG),
        ({1: 1, 2: None}, 1, Outcome.REFUSED),
        ({1: 1, 2: None}, 2, Outcome.ROLLED_BACK),
        ({1: None}, 1, Outcome.NOTHING),
    ],
)
def test_verdicts(saved, reported, outcome, tmp_path):
    for step, number in saved.items():
        path = TorchSave.path(tmp_path, step)
        if number is None:
            path.touch()
        else:
            TorchSave.write(path, contents.content(number))
    assert verdicts.survivors(TorchSave, tmp_path, reported, False).outcome is outcome


def test_a_mixture_is_wrong(tmp_path):
    first, second = contents.content(1), contents.content(2)
    for name, tensor in first.items():
        TorchSave.write(TorchSave.path(tmp_path, 1), {**second, name: tensor})
        outcome = verdicts.survivors(TorchSave, tmp_path, 1, True).outcome
        assert outcome is (Outcome.WRONG if tensor.numel() else Outcome.CORRECT), name


def test_leftovers_must_go(tmp_path):
    verdicts.save_steps(Demanding, tmp_path, [1])
    assert verdicts.resumed(Demanding, tmp_path).outcome is Outcome.CORRECT
    (tmp_path / "step-9.tmp-1").touch()
    assert verdicts.resumed(Demanding, tmp_path).outcome is Outcome.STUCK
