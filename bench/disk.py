"""The disk under a benchmark: its facts, a quiet moment on it, the page cache over it, and the best that fio writes.

Linux only. fio's figure is the limit that a writer of new files is held against: direct writes from huge pages (from
4 KiB pages some disks take half the rate), then an fsync, the best of many configurations, each measured more than once
since a single run swings by more than most of them differ.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

FIO_BUFFERS = 300 << 20  # bytes, of the deepest queue of the largest blocks by all jobs, and fio's own alignment

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def facts(directory: Path) -> dict[str, str]:
    """The file system and the device that `directory` lies on."""
    device = os.stat(directory).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    found = {"filesystem": "unknown", "device": number, "scheduler": "unknown", "kernel": platform.release()}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, system = line.partition(" - ")
        if mount.split()[2] == number:
            found["filesystem"], found["device"] = system.split()[:2]
            found["options"] = mount.split()[5] + "; " + system.split()[2]
    queue = _block_device(directory) / "queue"
    if (queue / "scheduler").exists():
        schedulers = (queue / "scheduler").read_text()
        found["scheduler"] = schedulers.partition("[")[2].partition("]")[0] or schedulers.strip()
    return found


def _block_device(directory: Path) -> Path:
    """The whole device's folder in /sys, which need not exist."""
    device = os.stat(directory).st_dev
    path = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return path.parent if (path / "partition").exists() else path


def refusal(directory: Path, nbytes: int) -> str | None:
    """Why `nbytes` cannot be written directly here, or None."""
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        return f"{directory} has {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB are needed"
    filesystem = facts(directory)["filesystem"]
    if filesystem in ("tmpfs", "ramfs"):  # they accept O_DIRECT on newer kernels
        return f"{directory} ({filesystem}) lies in memory"
    path = directory / "direct"
    try:
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, 1 << 16) as aligned:
                os.write(file, aligned)
        finally:
            os.close(file)
    except OSError as error:
        return f"{directory} ({filesystem}) takes no direct writes: {error.strerror}"
    finally:
        path.unlink(missing_ok=True)
    return None


def settle(directory: Path) -> None:
    """Leaves no dirty page, and an idle device (within a second): deleted files leave it trimming."""
    os.sync()
    inflight = _block_device(directory) / "inflight"
    deadline = time.monotonic() + 1
    quiet = 0
    while inflight.exists() and quiet < 5 and time.monotonic() < deadline:
        quiet = quiet + 1 if inflight.read_text().split() == ["0", "0"] else 0
        time.sleep(0.01)


def files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


def fsync_all(directory: Path) -> None:
    """Every file below `directory`, then every folder."""
    for path in [*files(directory), *(path for path in directory.rglob("*") if path.is_dir()), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def cached_bytes(directory: Path) -> int:
    """How much of the files below is in the page cache, in whole pages."""
    pages = 0
    for path in files(directory):
        size = path.stat().st_size
        if size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
            view = ctypes.c_char.from_buffer(mapping)
            resident = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
            if _libc.mincore(ctypes.addressof(view), size, resident) != 0:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            pages += sum(byte & 1 for byte in resident.raw)
            del view
    return pages * mmap.PAGESIZE


def evict(directory: Path) -> None:
    """Takes the files below out of the page cache."""
    fsync_all(directory)
    for path in files(directory):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(directory) > 1 << 20 and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")


def read_all(directory: Path) -> None:
    """Brings the files below into the page cache."""
    for path in files(directory):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


class FioConfig(NamedTuple):
    engine: str
    block_mib: int
    depth: int
    jobs: int
    fallocate: str
    memory: str

    def __str__(self) -> str:
        jobs = f" x {self.jobs} jobs" if self.jobs > 1 else ""
        memory = "huge pages" if self.memory == "mmaphuge" else "4 KiB pages"
        return f"{self.engine} {self.block_mib}M QD{self.depth}{jobs}, fallocate {self.fallocate}, {memory}"


class FioRun(NamedTuple):
    seconds: float
    cpu_seconds: float


class FioRefused(Exception):
    """This build of fio, or this kernel, lacks the engine."""


def fio_absent() -> str | None:
    return None if shutil.which("fio") else "fio is not installed: apt install fio, or dnf install fio"


def _meminfo(key: str) -> int:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next((int(words[1]) for words in lines if words[0] == f"{key}:"), 0)


@contextlib.contextmanager
def fio_memory() -> Iterator[str]:
    """The kind of memory fio is to write from: huge pages where enough are free, or root can reserve them meanwhile."""
    wanted = -(-FIO_BUFFERS // (_meminfo("Hugepagesize") << 10)) if _meminfo("Hugepagesize") else 0
    missing = max(0, wanted - _meminfo("HugePages_Free"))
    reserved = Path("/proc/sys/vm/nr_hugepages")
    before = None
    if missing and os.geteuid() == 0:
        before = reserved.read_text()
        reserved.write_text(str(int(before) + missing))
    try:
        yield "mmaphuge" if wanted and _meminfo("HugePages_Free") >= wanted else "malloc"
    finally:
        if before is not None:
            reserved.write_text(before)


def run_fio(directory: Path, config: FioConfig, nbytes: int) -> FioRun:
    """Writes new files of `nbytes` in all into `directory`; fio's own start and the preallocation are not counted.

    fio times its own fsync. With io_uring, 3.33 does not wait for it unless the last round of requests is a full one:
    so it is, and one more fsync, which finds nothing to do then, is timed here.
    """
    block = config.block_mib << 20
    round_bytes = block * config.depth
    size = -(-nbytes // (config.jobs * round_bytes)) * round_bytes
    command = ["fio", "--name=write", f"--directory={directory}", "--rw=write", "--direct=1", "--end_fsync=1"]
    command += ["--thread", "--output-format=json", f"--ioengine={config.engine}", f"--bs={block}", f"--size={size}"]
    command += [f"--iodepth={config.depth}", f"--numjobs={config.jobs}", f"--fallocate={config.fallocate}"]
    command += [f"--iomem={config.memory}"]
    if config.engine == "io_uring":
        command += ["--fixedbufs=1", "--registerfiles=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise FioRefused(f"fio {config}: {done.stderr.strip()}")
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    seconds = max(job["write"]["runtime"] for job in jobs) * 1e-3
    cpu = sum((job["usr_cpu"] + job["sys_cpu"]) * 1e-2 * job["write"]["runtime"] * 1e-3 for job in jobs)
    start = time.perf_counter()
    fsync_all(directory)
    seconds += time.perf_counter() - start
    share = nbytes / (size * config.jobs)
    return FioRun(seconds * share, cpu * share)


def fio_configs(memory: str, quick: bool) -> list[FioConfig]:
    fallocate = ["native"] if quick else ["native", "none"]
    engines = [("psync", [1]), ("libaio", [8] if quick else [4, 16]), ("io_uring", [8] if quick else [4, 16])]
    return [
        FioConfig(engine, block, depth, jobs, method, memory)
        for engine, depths in engines
        for depth in depths
        for block in (1, 4, 8)
        for jobs in (1, 2)
        for method in fallocate
    ]


class FioSweep(NamedTuple):
    best: FioConfig
    rates: dict[FioConfig, float]  # GB/s, median
    refused: list[str]


def sweep_fio(directory: Path, nbytes: int, memory: str, quick: bool, tick: Callable[[str], None]) -> FioSweep:
    """Every configuration once, then the best six three times more; the best median of those wins."""
    times: dict[FioConfig, list[float]] = {}
    refused: dict[str, str] = {}

    def measure(configs: list[FioConfig]) -> None:
        random.shuffle(configs)
        for config in configs:
            tick(f"fio {config}")
            empty(directory)
            settle(directory)
            if config.engine in refused:
                continue
            try:
                times.setdefault(config, []).append(run_fio(directory, config, nbytes).seconds)
            except FioRefused as error:
                refused[config.engine] = str(error)

    def by_time(config: FioConfig) -> float:
        return statistics.median(times[config])

    measure(fio_configs(memory, quick))
    if not times:
        raise FioRefused("; ".join(refused.values()))
    finalists = sorted(times, key=by_time)[:6]
    measure(finalists * 3)
    empty(directory)
    rates = {config: nbytes / by_time(config) * 1e-9 for config in times}
    return FioSweep(min(finalists, key=by_time), rates, list(refused.values()))
