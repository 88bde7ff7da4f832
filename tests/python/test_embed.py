"""C and C++ programs build against the installed package and run: by CMake's package and by pkg-config."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import narrowgauge as ng
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
    output = run(tmp_path / "consumer_cpp", tmp_path / "direct")
    check_output(output, "C++")
    assert re.search(r"4194304 bytes by (io_uring|threads)", output)
    assert (tmp_path / "direct").read_bytes()[250:253] == bytes([250, 0, 1])

    np = pytest.importorskip("numpy")
    weights = np.random.default_rng(0).standard_normal((3, 5, 70), dtype=np.float32)
    for name in ("fp6", "fp4", "int8", "uint4:g16:fp16", "nf4:g32:bf16", "nvfp4", "mxfp6", "fp5_e2m2:g48:fp32"):
        q = ng.quantize(weights, name)
        q.save(tmp_path / "python")
        check_output(run(tmp_path / "consumer_c", tmp_path / "python", tmp_path / "c"), "C")
        back = ng.QTensor.load(tmp_path / "c", library="numpy")
        assert (back.format, back.shape) == (q.format, q.shape)
        for expected, seen in zip(q.canonical(), back.canonical(), strict=True):
            np.testing.assert_array_equal(seen, expected)


@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("mpirun"), reason="cmake or MPI is not installed")
def test_mpi(tmp_path: Path) -> None:
    run("cmake", "-S", SOURCES, "-B", tmp_path, f"-Dnarrowgauge_DIR={package_path('--cmake-dir')}")
    run("cmake", "--build", tmp_path, "--target", "mpi", "collectives_mpi")
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    output = run("mpirun", "--oversubscribe", "-n", "4", tmp_path / "mpi", **as_root)
    assert output.splitlines() == ["4 ranks over MPI, nodes of 0", "4 ranks over MPI, nodes of 2"]
    output = run("mpirun", "--oversubscribe", "-n", "4", tmp_path / "collectives_mpi", **as_root)
    assert re.fullmatch(r"4 ranks: mean 2\.(49|50)\d", output.strip())


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not installed")
def test_pkg_config(tmp_path: Path) -> None:
    flags = run("pkg-config", "--cflags", "--libs", "narrowgauge", PKG_CONFIG_PATH=package_path("--pkg-config-dir"))
    program = tmp_path / "consumer_c"
    compiler = os.environ.get("CC", "cc")
    run(compiler, "-std=c99", "-Wall", "-Werror", SOURCES / "consumer.c", "-o", program, *flags.split())
    check_output(run(program), "C")


def test_include_dir() -> None:
    assert (Path(package_path("--include-dir")) / "narrowgauge" / "narrowgauge.h").is_file()
