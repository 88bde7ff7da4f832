"""What an instruction becomes when it is decoded.

Most instructions become a plain function of the lanes that execute it (Operation). The few that change the flow of
control, or that lanes must meet for, become one of the records below, which the scheduler acts on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# The lanes of an operation: slice(None) when it is every lane of the batch, which numpy does without copying; else
# their numbers.
Lanes = slice | np.ndarray
ALL = slice(None)

Reader = Callable[[Lanes], np.ndarray]  # one value for each lane, or a single one for all
Writer = Callable[[Lanes, np.ndarray], None]
Operation = Callable[[Lanes], None]


@dataclass(frozen=True)
class Branch:
    target: int


@dataclass(frozen=True)
class Exit:
    pass


@dataclass(frozen=True)
class WarpSync:
    """Lanes of a warp execute it together: the scheduler waits for all that `members` names (a mask), or for the whole
    warp if `aligned`. The function also gets which lanes of the batch take part."""

    execute: Callable[[Lanes, np.ndarray], None]
    members: Reader | None = None
    aligned: bool = False


@dataclass(frozen=True)
class Reduction:
    """of bar.red"""

    op: str  # popc, and, or
    source: Reader
    write: Writer


@dataclass(frozen=True)
class Barrier:
    number: Reader
    threads: Reader | None = None  # how many must arrive; None: all of the block
    arrive_only: bool = False
    reduction: Reduction | None = None


Step = Operation | Branch | Exit | WarpSync | Barrier
