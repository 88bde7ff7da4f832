"""C and C++ programs build against the installed package and run: by CMake's package and by pkg-config."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "embed"


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"{command} exited with {result.returncode}:\n{result.stdout}{result.stderr}"
    return result.stdout


def package_path(option: str) -> str:
    return run(sys.executable, "-m", "narrowgauge", option).strip()


def check_output(text: str, language: str) -> None:
    assert f"{language}: refused as it should be" in text
    assert "fp6_e2m3:g128:fp16" in text


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_package(tmp_path: Path) -> None:
    run("cmake", "-S", SOURCES, "-B", tmp_path, f"-Dnarrowgauge_DIR={package_path('--cmake-dir')}")
    run("cmake", "--build", tmp_path)
    check_output(run(tmp_path / "consumer_cpp"), "C++")
    check_output(run(tmp_path / "consumer_c"), "C")


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not installed")
def test_pkg_config(tmp_path: Path) -> None:
    flags = run("pkg-config", "--cflags", "--libs", "narrowgauge", PKG_CONFIG_PATH=package_path("--pkg-config-dir"))
    program = tmp_path / "consumer_c"
    compiler = os.environ.get("CC", "cc")
    run(compiler, "-std=c99", "-Wall", "-Werror", SOURCES / "consumer.c", "-o", program, *flags.split())
    check_output(run(program), "C")


def test_include_dir() -> None:
    assert (Path(package_path("--include-dir")) / "narrowgauge" / "narrowgauge.h").is_file()
