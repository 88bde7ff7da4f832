"""What limits a kernel on a GPU whose figures are known. A model: no figure of it was measured by us.

The blocks of a launch go over the multiprocessors in waves of as many as fit. A wave takes as long as the slowest of
DRAM and L2, which deliver its bytes, and of what the busiest multiprocessor needs for its share: Tensor Cores, issue
slots, passes of shared memory. DRAM delivers no more than the bytes that are in flight in the time of its latency, and
a launch begins with one latency. Nothing else is in it (no caches that miss, no clocks that drop), and nothing is
fitted. bench/gpu_model.py checks it against what others have published.
"""

from __future__ import annotations

from typing import NamedTuple

MMA_MACS = 16 * 8 * 16  # multiply-adds of an mma.m16n8k16


class Gpu(NamedTuple):
    """As its maker says, where no other source is named."""

    name: str  # as the driver gives it, after "NVIDIA "
    multiprocessors: int
    clock: float  # Hz, boost
    dram: float  # bytes a second
    l2: float | None  # bytes a second; None: not published, and not in the model
    macs: float  # fp16 with fp32 sums, by mma.sync, of a multiprocessor in a clock
    dense_macs: float  # the same by the best instruction there is, as cuBLAS uses it
    latency: float = 0.6e-6  # s, of DRAM under load


# H100: no figure of its L2 is published, so the A100's; mma.sync at 0.62 of what wgmma reaches (arXiv 2402.13499).
GPUS = {
    "a100": Gpu("A100-SXM4-80GB", 108, 1.41e9, 2039e9, 5120 * 1.41e9, 1024, 1024),
    "h100": Gpu("H100 80GB HBM3", 132, 1.83e9, 3352e9, 5120 * 1.83e9, 0.62 * 2048, 2048),
    "a10": Gpu("A10", 72, 1.695e9, 600e9, None, 512, 512),
    "4070tis": Gpu("GeForce RTX 4070 Ti SUPER", 66, 2.61e9, 672e9, None, 256, 256),
}


class Work(NamedTuple):
    """A launch of equal blocks."""

    blocks: int
    resident: int  # blocks that a multiprocessor has at once
    dram_bytes: float  # of the launch, each counted once
    # Of a block:
    l2_bytes: float
    bytes_in_flight: float
    mma: float  # m16n8k16, of warps
    instructions: float = 0  # of warps; 0: not counted
    wavefronts: float = 0  # of shared memory; 0: not counted
    # Of the launch: sums that it writes to L2 and a second launch reads; 0: there is none.
    workspace_bytes: float = 0


class Estimate(NamedTuple):
    seconds: float
    limit: str  # what takes the longest


def estimate(gpu: Gpu, work: Work) -> Estimate:
    """How long a launch takes, and what it waits for. pre: blocks and resident are positive."""
    slots = gpu.multiprocessors * work.resident
    total, waits = gpu.latency, dict.fromkeys(("DRAM", "L2", "Tensor Cores", "issue slots", "shared memory"), 0.0)
    for count, blocks in ((work.blocks // slots, slots), (1, work.blocks % slots)):
        if count == 0 or blocks == 0:
            continue
        share = work.dram_bytes * blocks / work.blocks
        busiest = -(-blocks // gpu.multiprocessors) / gpu.clock
        times = {
            "DRAM": share / min(gpu.dram, blocks * work.bytes_in_flight / gpu.latency),
            "L2": blocks * work.l2_bytes / gpu.l2 if gpu.l2 else 0.0,
            "Tensor Cores": busiest * work.mma * MMA_MACS / gpu.macs,
            "issue slots": busiest * work.instructions / 4,
            "shared memory": busiest * work.wavefronts,
        }
        slowest = max(times, key=lambda name: times[name])
        waits[slowest] += count * times[slowest]
        total += count * times[slowest]
    if work.workspace_bytes:
        total += gpu.latency + 2 * work.workspace_bytes / (gpu.l2 or gpu.dram)
    return Estimate(total, max(waits, key=lambda name: waits[name]))


def dense(gpu: Gpu, m: int, n: int, k: int) -> float:
    """Seconds of x @ w.T in 16 bits that no library can beat: every byte once, or all Tensor Cores all the time."""
    moved = 2 * (n * k + m * k + m * n)
    return gpu.latency + max(moved / gpu.dram, m * n * k / (gpu.multiprocessors * gpu.dense_macs * gpu.clock))
