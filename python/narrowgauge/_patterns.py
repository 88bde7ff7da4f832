"""How names are picked: one rule for modules, tensors and parts of a state, wherever narrowgauge takes a pattern."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether an fnmatch pattern matches a dotted name, or its last parts: "lm_head" is also "model.lm_head"."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
