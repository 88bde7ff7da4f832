"""Kernels with one synchronisation missing, to test tests with.

A test that passes on such a mutant, without a hazard, does not test that synchronisation, or the kernel does not need
it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SYNCHRONISATION = re.compile(
    r"\s*\{?\s*(@\S+\s+)?"
    r"(bar\.(warp\.)?sync|barrier\.|cp\.async\.wait|wgmma\.wait_group|wgmma\.fence|mbarrier\.arrive|fence)"
)


def sync_mutants(text: str, kernel: str) -> Iterator[tuple[int, str, str]]:
    """(PTX line, its text, the module without that line) for every synchronising instruction of a kernel."""
    lines = text.split("\n")
    start = next((k for k, line in enumerate(lines) if ".entry " in line and kernel in line), None)
    if start is None:
        raise KeyError(f"no kernel of the module is named {kernel}")
    end = next((k for k in range(start + 1, len(lines)) if ".entry " in lines[k]), len(lines))
    for k in range(start, end):
        if _SYNCHRONISATION.match(lines[k]):
            yield k + 1, lines[k].strip(), "\n".join([*lines[:k], "//", *lines[k + 1 :]])
