"""What work costs this process beside time: CPU seconds of all its threads, and memory at its peak (Linux)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cpu_seconds() -> float:
    """User and system time, threads that have ended and io_uring's workers included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


class Peak:
    """Bytes that the resident set grew by at its highest."""

    nbytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    peak = Peak()
    Path("/proc/self/clear_refs").write_text("5\n")  # the high-water mark starts again at the present size
    before = _status("VmRSS:")
    yield peak
    peak.nbytes = _status("VmHWM:") - before
