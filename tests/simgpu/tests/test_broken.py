"""Each fault that README.md lists, in a kernel of its own: found by default, with its place; clean once repaired."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simgpu

SOURCE = Path(__file__).parent / "broken.cu"
BLOCKS, THREADS = 2, 128

# kernel: (what is reported, block, thread)
FAULTS = {
    "global_out_of_bounds": ("out-of-bounds global read of 4 bytes", 1, 127),
    "global_misaligned": ("misaligned global read of 4 bytes", 0, 3),
    "null_pointer": ("null-pointer global read of 4 bytes", 0, 0),
    "write_to_read_only": ("write of 4 bytes to read-only memory", 0, 4),
    "use_after_free": ("use-after-free global read of 4 bytes", 0, 0),
    "global_uninitialised": ("uninitialised global read", 0, 7),
    "global_uninitialised_atomic": ("uninitialised global atomic", 0, 7),
    "two_blocks_write_one_byte": ("two blocks write the same global byte", 0, 8),
    "shared_out_of_bounds": ("out-of-bounds shared write of 4 bytes", 0, 127),
    "shared_misaligned": ("misaligned shared write of 4 bytes", 0, 9),
    "local_out_of_bounds": ("out-of-bounds local read of 4 bytes", 0, 3),
    "shared_uninitialised": ("uninitialised shared read", 0, 7),
    "shared_uninitialised_atomic": ("uninitialised shared atomic", 0, 7),
    "shared_read_after_write": ("read after write: no barrier between warps", 0, 0),
    "shared_write_after_read": ("write after read: no barrier between warps", 0, 0),
    "shared_write_after_write": ("write after write: no barrier between warps", 0, 0),
    "shared_atomic_after_write": ("atomic after write: no barrier between warps", 0, 32),
    "shared_read_after_atomic": ("read after atomic: no barrier between warps", 0, 0),
    "shared_two_values": ("write after write: two lanes store different values in one instruction", 0, 11),
    "warp_read_after_write": ("read after write: no __syncwarp between lanes of a warp", 0, 0),
    "warp_write_after_read": ("write after read: no __syncwarp between lanes of a warp", 0, 31),
    "shuffle_from_absent_lane": ("shfl reads a lane that does not take part", 0, 0),
    "lane_outside_mask": ("without being in its membermask", 0, 8),
    "aligned_after_exit": ("an .aligned instruction is executed after a lane of the warp has ended", 0, 0),
    "divergent_barrier": ("one barrier is reached at different instructions", 0, 0),
    "deadlock": ("deadlock", 0, 32),
    "endless_loop": ("no end after", 0, 0),
    "cp_async_without_wait": ("read after write: asynchronous copy still in flight", 0, 0),
    "cp_async_never_waited": ("asynchronous operation was never waited for", 0, 0),
    "cp_async_of_uninitialised": ("uninitialised global read", 0, 12),
    "bulk_of_uninitialised": ("uninitialised global read", 0, 0),
    "bulk_without_wait": ("read after write: asynchronous copy still in flight", 0, 0),
    "bulk_never_waited": ("asynchronous operation was never waited for", 0, 0),
    "mbarrier_before_init": ("mbarrier is used by a warp that is not ordered after its initialisation", 0, 32),
    "mbarrier_overrun": ("more arrivals at the mbarrier than its count", 0, 1),
    "wgmma_result_before_wait": ("accumulator of wgmma is used before wgmma.wait_group", 0, 0),
    "wgmma_overwritten": ("write after read: asynchronous operation still reads", 0, 0),
    "wgmma_never_waited": ("asynchronous operation was never waited for", 0, 0),
}


@pytest.fixture(scope="module", params=[True, False], ids=["broken", "repaired"])
def programs(request: pytest.FixtureRequest) -> Iterator[tuple[bool, simgpu.Program]]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    yield request.param, simgpu.compile(SOURCE, "sm_90a", [f"-DBROKEN={int(request.param)}"])


def marked_line(kernel: str) -> int:
    """Of the comment "fault" in a kernel."""
    lines = SOURCE.read_text().split("\n")
    start = lines.index(next(line for line in lines if line.startswith(f"KERNEL({kernel})")))
    return next(number for number, line in enumerate(lines[start:], start + 1) if "// fault" in line)


def report_of(kind: str, message: str) -> str:
    """The part of an error's message that tells of one kind of hazard."""
    return next(part for part in re.split(r"\n(?=\S)", message) if kind in part)


@pytest.mark.parametrize("kernel", FAULTS)
def test_fault(programs: tuple[bool, simgpu.Program], kernel: str) -> None:
    broken, program = programs
    n = BLOCKS * THREADS
    device = simgpu.Device(1 << 20)
    values = device.array(np.tile(np.arange(THREADS, dtype=np.float32), BLOCKS), readonly=True)
    args: list[simgpu.Buffer | int] = [values, device.empty(n, np.float32), n]
    if not broken:
        program.launch(kernel, BLOCKS, THREADS, args, device).clean()
        return
    if kernel == "use_after_free":
        values.free()
    if kernel == "null_pointer":
        args[0] = 0
    with pytest.raises(simgpu.SimError) as caught:
        program.launch(kernel, BLOCKS, THREADS, args, device, max_steps=1000).clean()
    message = str(caught.value)
    assert message.startswith(f"{kernel}: ")
    kind, block, thread = FAULTS[kernel]
    report = report_of(kind, message)
    assert f"block ({block},0,0) thread ({thread},0,0)" in report
    assert f"{SOURCE}:{marked_line(kernel)})" in report, marked_line(kernel)
    place = re.search(r"PTX line (\d+) .*: (?:@!?\S+ )?(\S+)", report)
    assert place and place.group(2) in program.module.text.split("\n")[int(place.group(1)) - 1]


def test_every_kernel_is_listed() -> None:
    assert re.findall(r"^KERNEL\((\w+)\)", SOURCE.read_text(), re.MULTILINE) == list(FAULTS)
