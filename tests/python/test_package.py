"""The package as it is installed: its version, its symbols, and what importing it brings in."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import narrowgauge
import pytest


def native_path() -> Path:
    spec = importlib.util.find_spec("narrowgauge._native")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def binutil(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return subprocess.run([name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def test_version_is_the_same_everywhere() -> None:
    pkg_config = (native_path().parent / "lib" / "pkgconfig" / "narrowgauge.pc").read_text()
    assert narrowgauge.__version__ == importlib.metadata.version("narrowgauge")
    assert f"Version: {narrowgauge.__version__}\n" in pkg_config


def test_module_exports_its_init_function_and_what_torch_looks_up() -> None:
    lines = binutil("nm", "-D", "--defined-only", "-C", native_path()).splitlines()
    symbols = {line.split(maxsplit=2)[2] for line in lines}
    # nanobind throws these across modules, so their type information has to be shared.
    shared = r"(typeinfo|typeinfo name|vtable) for nanobind::.*"
    assert {symbol for symbol in symbols if not re.fullmatch(shared, symbol)} == {
        "PyInit__native",
        "ng_torch_cuda_malloc",
        "ng_torch_cuda_free",
    }


def test_module_links_only_the_system() -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", binutil("readelf", "-d", native_path()))
    allowed = r"(libstdc\+\+|libgcc_s|libm|libc|libdl|libpthread|ld-linux-x86-64)\.so\.\d+"
    assert [name for name in needed if not re.fullmatch(allowed, name)] == []


def test_c_interface_is_in_the_static_library() -> None:
    header = (native_path().parent / "include" / "narrowgauge" / "narrowgauge.h").read_text()
    declared = set(re.findall(r"\b(ng_\w+)\(", re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)))
    symbols = binutil("nm", "--defined-only", native_path().parent / "lib" / "libnarrowgauge.a")
    assert len(declared) > 10
    assert declared <= set(re.findall(r" T (\w+)", symbols))


def test_static_library_neither_needs_nor_offers_liburing() -> None:
    symbols = binutil("nm", native_path().parent / "lib" / "libnarrowgauge.a")
    uring = re.findall(r" (\w) (_*io_uring_\w+)", symbols)
    assert {kind for kind, _ in uring} <= {"t"}, "only local functions"


def test_instruction_set_objects_have_no_weak_symbols() -> None:
    """An inline function compiled for AVX-512 may be the copy that the linker keeps for everyone."""
    lines = binutil("nm", "-A", "-C", "--defined-only", native_path().parent / "lib" / "libnarrowgauge.a").splitlines()
    kernels = [line for line in lines if re.search(r":(portable|avx\w+)\.cpp\.o:", line)]
    assert kernels, "the library holds no instruction-set objects"
    assert [line for line in kernels if re.search(r" [WVu] ", line)] == []


def test_import_brings_in_nothing_but_ourselves() -> None:
    program = """
import json, sys
before = set(sys.modules)
import narrowgauge
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    foreign = set(json.loads(output)) - set(sys.stdlib_module_names) - {"narrowgauge", "nanobind_backend"}
    assert foreign == set()
