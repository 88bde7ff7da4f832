"""Small runs of the kernels beside this file, for `python -m simgpu mutate|report`, and the inputs that tests share."""

from __future__ import annotations

import numpy as np
import simgpu

RNG = np.random.default_rng(0)


def to_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(codes: np.ndarray) -> np.ndarray:
    return (codes.astype(np.uint32) << 16).view(np.float32)


def multiply(
    program: simgpu.Program, name: str, m: int, n: int, k: int, kind: str = "f16"
) -> tuple[simgpu.Launch, np.ndarray, np.ndarray]:
    """The launch of a kernel of gemm.cu, its result, and the reference in double precision."""
    x = RNG.standard_normal((m, k)).astype(np.float16)
    w = RNG.standard_normal((k, n)).astype(np.float16)
    if kind == "bf16":
        x, w = to_bf16(x), to_bf16(w)
        reference = from_bf16(x).astype(float) @ from_bf16(w).astype(float)
    else:
        reference = x.astype(float) @ w.astype(float)
    device = simgpu.Device(16 << 20)
    y = device.empty((m, n), np.float32)
    args = [device.array(x), device.array(w), y, m, n, k]
    launch = program.launch(name, (n // 64, (m + 63) // 64), 128, args, device)
    return launch, y.get(), reference


def pack_fp6(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) codes s eee mm to 4-bit and 2-bit segments in the order of gemm_fp6's fragments."""
    n, k = codes.shape
    high = (codes >> 2).reshape(n // 16, 16, k // 64, 4, 16)
    low = (codes & 3).reshape(n // 16, 16, k // 64, 4, 16)
    w4 = np.zeros((n // 16, k // 64, 32, 4), np.uint32)
    w2 = np.zeros((n // 16, k // 64, 32, 2), np.uint32)
    g, t = np.arange(32) // 4, np.arange(32) % 4
    for block in range(4):
        for j in range(4):
            row, column = g + 8 * (j >> 1), 2 * t + 8 * (j & 1)
            for half in range(2):
                four = high[:, row, :, block, column + half].transpose(1, 2, 0).astype(np.uint32)
                two = low[:, row, :, block, column + half].transpose(1, 2, 0).astype(np.uint32)
                w4[:, :, :, block] |= four << np.uint32(16 * half + 12 - 4 * j)
                w2[:, :, :, block >> 1] |= two << np.uint32(16 * half + 14 - 2 * ((block & 1) * 4 + j))
    return w4, w2


def multiply_fp6(program: simgpu.Program, m: int, n: int, k: int) -> simgpu.Launch:
    codes = RNG.integers(0, 64, (n, k)).astype(np.uint32)
    sign, exponent, mantissa = codes >> 5, (codes >> 2) & 7, codes & 3
    magnitude = np.where(exponent == 0, mantissa * 2.0**-4, (1 + mantissa / 4) * 2.0 ** (exponent.astype(float) - 3))
    w = np.where(sign == 1, -magnitude, magnitude)
    w4, w2 = pack_fp6(codes)
    x = RNG.standard_normal((m, k)).astype(np.float16)
    scales = RNG.uniform(0.5, 2, n).astype(np.float32)
    device = simgpu.Device(16 << 20)
    y = device.empty((m, n), np.float16)
    args = [*map(device.array, (x, w4, w2, scales)), y, m, n, k]
    launch = program.launch("gemm_fp6", (n // 64, 1), 128, args, device, shared=2 * 64 * 64 * 2 + 256 * 24).clean()
    reference = (x.astype(float) @ w.T) * scales
    assert np.abs(y.get() - reference).max() <= 1e-3 * np.abs(reference).max()
    return launch


def tiles(x: np.ndarray, swizzled: bool) -> np.ndarray:
    """64 x K as tiles of 64 x 64 in the layout that the descriptors of wgmma.cu name."""
    out = []
    for start in range(0, x.shape[1], 64):
        chunks = x[:, start : start + 64].reshape(64, 8, 8)
        if swizzled:
            tile, row = np.empty_like(chunks), np.arange(64)
            for q in range(8):
                tile[row, q ^ (row & 7)] = chunks[row, q]
        else:
            tile = chunks.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3)
        out.append(tile.ravel())
    return np.concatenate(out)


def multiply_wgmma(program: simgpu.Program, name: str, swizzled: bool, k: int = 256, decay: float = 1) -> simgpu.Launch:
    a, b = RNG.standard_normal((2, 64, k)).astype(np.float16)
    device = simgpu.Device(16 << 20)
    y = device.empty((64, 64), np.float32)
    args = [device.array(tiles(a, swizzled)), device.array(tiles(b, swizzled)), y, k, decay]
    launch = program.launch(name, 1, 160, args, device, shared=32768).clean()
    factors = np.repeat(decay ** np.arange(k // 64 - 1, -1, -1.0), 64)
    assert np.abs(y.get() - (a * factors) @ b.astype(float).T).max() < 1e-4
    return launch


@simgpu.case("gemm.cu", "gemm_f16", elements=64 * 64)
def gemm_f16(program: simgpu.Program) -> simgpu.Launch:
    launch, y, reference = multiply(program, "gemm_f16", 64, 64, 256)
    launch.clean()
    assert np.abs(y - reference).max() < 1e-4
    return launch


@simgpu.case("gemm.cu", "gemm_bf16", elements=64 * 64)
def gemm_bf16(program: simgpu.Program) -> simgpu.Launch:
    launch, y, reference = multiply(program, "gemm_bf16", 64, 64, 256, "bf16")
    launch.clean()
    assert np.abs(y - reference).max() < 1e-4
    return launch


@simgpu.case("gemm.cu", "gemm_conflicts", elements=64 * 64)
def gemm_conflicts(program: simgpu.Program) -> simgpu.Launch:
    launch, y, reference = multiply(program, "gemm_conflicts", 64, 64, 256)
    launch.clean()
    assert np.abs(y - reference).max() < 1e-4
    return launch


@simgpu.case("gemm.cu", "gemm_fp6", elements=64 * 64)
def gemm_fp6(program: simgpu.Program) -> simgpu.Launch:
    return multiply_fp6(program, 64, 64, 256)


@simgpu.case("wgmma.cu", "wgmma_plain", elements=64 * 64, arch="sm_90a")
def wgmma_plain(program: simgpu.Program) -> simgpu.Launch:
    return multiply_wgmma(program, "wgmma_plain", False)


@simgpu.case("wgmma.cu", "wgmma_sw128", elements=64 * 64, arch="sm_90a")
def wgmma_sw128(program: simgpu.Program) -> simgpu.Launch:
    return multiply_wgmma(program, "wgmma_sw128", True)


@simgpu.case("wgmma.cu", "wgmma_pipelined", elements=64 * 64, arch="sm_90a")
def wgmma_pipelined(program: simgpu.Program) -> simgpu.Launch:
    return multiply_wgmma(program, "wgmma_pipelined", True)


@simgpu.case("simt.cu", "vadd", elements=1000)
def vadd(program: simgpu.Program) -> simgpu.Launch:
    x, y = RNG.standard_normal((2, 1000)).astype(np.float32)
    device = simgpu.Device(1 << 20)
    out = device.empty(1000, np.float32)
    launch = program.launch("vadd", 8, 128, [device.array(x), device.array(y), out, 1000], device).clean()
    np.testing.assert_array_equal(out.get(), x + y)
    return launch


@simgpu.case("simt.cu", "reduce", elements=5000)
def reduce(program: simgpu.Program) -> simgpu.Launch:
    x = RNG.standard_normal(5000).astype(np.float32)
    device = simgpu.Device(1 << 20)
    out = device.zeros(1, np.float32)
    launch = program.launch("reduce", 4, 256, [device.array(x), out, len(x)], device).clean()
    assert abs(out.get()[0] - x.astype(float).sum()) < 1e-3
    return launch


@simgpu.case("simt.cu", "hist", elements=2000)
def hist(program: simgpu.Program) -> simgpu.Launch:
    x = RNG.integers(0, 64, 2000).astype(np.int32)
    device = simgpu.Device(1 << 20)
    counts = device.zeros(64, np.int32)
    launch = program.launch("hist", 1, 256, [device.array(x), counts, len(x)], device).clean()
    np.testing.assert_array_equal(counts.get(), np.bincount(x, minlength=64))
    return launch


@simgpu.case("simt.cu", "lock", elements=120)
def lock(program: simgpu.Program) -> simgpu.Launch:
    device = simgpu.Device(1 << 20)
    held, entered = device.zeros(1, np.int32), device.zeros(1, np.int32)
    launch = program.launch("lock", 3, 40, [held, entered], device).clean()
    assert entered.get()[0] == 120 and held.get()[0] == 0
    return launch


@simgpu.case("simt.cu", "collatz", elements=300)
def collatz(program: simgpu.Program) -> simgpu.Launch:
    def steps(x: int) -> int:
        count = 0
        while x != 1:
            x = 3 * x + 1 if x & 1 else x >> 1
            count += 1
        return count

    x = RNG.integers(1, 1000, 300).astype(np.int32)
    device = simgpu.Device(1 << 20)
    out = device.zeros(300, np.int32)
    launch = program.launch("collatz", 5, 64, [device.array(x), out, 300], device).clean()
    assert out.get().tolist() == [steps(value) for value in x.tolist()]
    return launch


@simgpu.case("simt.cu", "local_array", elements=64)
def local_array(program: simgpu.Program) -> simgpu.Launch:
    device = simgpu.Device(1 << 20)
    out = device.zeros(64, np.int32)
    launch = program.launch("local_array", 1, 64, [out, 20], device).clean()
    assert out.get().tolist() == [sum(((k * 7) & 15) * thread for k in range(20)) for thread in range(64)]
    return launch


@simgpu.case("simt.cu", "warp_votes", elements=64)
def warp_votes(program: simgpu.Program) -> simgpu.Launch:
    device = simgpu.Device(1 << 20)
    out = device.zeros((64, 4), np.uint32)
    launch = program.launch("warp_votes", 1, 64, [out], device).clean()
    for thread, (ballot, match, total, count) in enumerate(out.get().tolist()):
        warp = range(thread // 32 * 32, thread // 32 * 32 + 32)
        assert ballot == sum(1 << (lane & 31) for lane in warp if lane % 3 == 0)
        assert match == sum(1 << (lane & 31) for lane in warp if lane % 5 == thread % 5)
        assert total == sum(warp) and count == 32
    return launch


@simgpu.case("simt.cu", "strided", elements=32)
def strided(program: simgpu.Program) -> simgpu.Launch:
    device = simgpu.Device(1 << 20)
    out = device.zeros(32, np.float32)
    launch = program.launch("strided", 1, 32, [device.array(np.arange(1024, dtype=np.float32)), out], device).clean()
    assert out.get().tolist() == list(range(0, 1024, 32))
    return launch
