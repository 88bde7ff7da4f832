"""Fragment layouts against the same written as CuTe does: strides of lane and value in a column-major matrix."""

from __future__ import annotations

from simgpu import fragments


def test_m16n8k16() -> None:
    a, b = fragments.index_a(16, 2, 4), fragments.index_b(16, 2, 2)
    rows, columns = fragments.coordinates_c(packed=False)
    for lane in range(32):
        for v in range(8):  # ((4,8),(2,2,2)) : ((32,1),(16,8,128))
            at = lane % 4 * 32 + lane // 4 + (v & 1) * 16 + (v >> 1 & 1) * 8 + (v >> 2) * 128
            assert a[at % 16, at // 16] == lane * 8 + v
        for v in range(4):  # ((4,8),(2,2)) : ((16,1),(8,64)) of the transposed matrix
            at = lane % 4 * 16 + lane // 4 + (v & 1) * 8 + (v >> 1) * 64
            assert b[at // 8, at % 8] == lane * 4 + v
        for v in range(4):  # ((4,8),(2,2)) : ((32,1),(16,8))
            at = lane % 4 * 32 + lane // 4 + (v & 1) * 16 + (v >> 1) * 8
            assert (rows[lane, v, 0], columns[lane, v, 0]) == (at % 16, at // 16)
