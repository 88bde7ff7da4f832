"""Damage to the files of one checkpoint: each function changes what is on disk and says what it changed.

Every change is one that a reader could see: if it left all bytes as they were, nothing is returned. Nothing here knows
a contender.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple


class Damage(NamedTuple):
    what: str
    path: Path
    # The bytes that changed in place; the whole file where that is not what happened.
    start: int = 0
    stop: int | None = None
    # The file is sound by itself and does not fit the others: nobody can tell which of them is the wrong one.
    foreign: bool = False

    def __str__(self) -> str:
        where = "" if self.stop is None else f" at {self.start}..{self.stop - 1}"
        return f"{self.what} in {self.path.name}{where}"


def flip_bits(path: Path, start: int, stop: int, rng: Random) -> Damage:
    """One bit in [start, stop), or up to eight close to each other."""
    count = rng.choice([1, 1, 2, 8])
    first = rng.randrange(start, stop)
    last = min(first + 16, stop)
    bits = rng.sample(range(8 * first, 8 * last), min(count, 8 * (last - first)))
    with path.open("r+b") as file:
        for bit in bits:
            file.seek(bit // 8)
            byte = file.read(1)[0] ^ (1 << bit % 8)
            file.seek(bit // 8)
            file.write(bytes([byte]))
    changed = [bit // 8 for bit in bits]
    return Damage(f"{len(bits)} bits flipped", path, min(changed), max(changed) + 1)


def change_digit(path: Path, rng: Random) -> Damage | None:
    """A decimal digit of a text becomes another one: it still parses."""
    data = bytearray(path.read_bytes())
    digits = [index for index, byte in enumerate(data) if 48 <= byte < 58]
    if not digits:
        return None
    index = rng.choice(digits)
    data[index] = rng.choice([digit for digit in b"123456789" if digit != data[index]])
    path.write_bytes(data)
    return Damage("a digit changed", path, index, index + 1)


def zero_hole(path: Path, rng: Random) -> Damage | None:
    """4 to 64 KiB of zeros, on a block boundary as a lost block write leaves them, or anywhere."""
    size = path.stat().st_size
    length = rng.randrange(4 << 10, (64 << 10) + 1, 4 << 10)
    start = rng.randrange(0, size, 4096) if rng.random() < 0.5 else rng.randrange(size)
    with path.open("r+b") as file:
        file.seek(start)
        old = file.read(length)
        if not any(old):
            return None
        file.seek(start)
        file.write(bytes(len(old)))
    return Damage("zeroed hole", path, start, start + len(old))


def truncate(path: Path, rng: Random) -> Damage:
    size = path.stat().st_size
    length = rng.choice([0, size - 1, rng.randrange(size), rng.randrange(size) // 4096 * 4096])
    os.truncate(path, length)
    return Damage(f"truncated from {size} to {length} bytes", path)


def extend(path: Path, rng: Random) -> Damage:
    length = rng.choice([1, 512, 4096])
    with path.open("ab") as file:
        file.write(rng.choice([bytes(length), rng.randbytes(length)]))
    return Damage(f"{length} bytes appended", path)


def replace(path: Path, other: Path) -> Damage | None:
    """The file of another checkpoint under this one's name."""
    if path.read_bytes() == other.read_bytes():
        return None
    shutil.copyfile(other, path)
    return Damage(f"replaced by that of {other.parent.name}", path, foreign=True)


def delete(path: Path) -> Damage:
    path.unlink()
    return Damage("deleted", path)


def replace_by_symlink(path: Path, target: Path) -> Damage:
    path.unlink()
    path.symlink_to(target)
    return Damage(f"a symbolic link to {target}", path)


def replace_by_fifo(path: Path) -> Damage:
    path.unlink()
    os.mkfifo(path)
    return Damage("a fifo", path)


def replace_by_directory(path: Path) -> Damage:
    path.unlink()
    path.mkdir()
    return Damage("a directory", path)


def outside(spans: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """What of [0, size) no span covers."""
    gaps, reached = [], 0
    for start, stop in [*sorted(spans), (size, size)]:
        if start > reached:
            gaps.append((reached, start))
        reached = max(reached, stop)
    return gaps
