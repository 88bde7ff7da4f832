"""Threads, warps, blocks and their memory: results, counters, and planted faults."""

from __future__ import annotations

from collections.abc import Callable

import cases
import numpy as np
import pytest
import simgpu

RNG = np.random.default_rng(2)


@pytest.fixture
def program(compiled: Callable[..., simgpu.Program]) -> simgpu.Program:
    return compiled("simt.cu")


@pytest.fixture
def device() -> simgpu.Device:
    return simgpu.Device(1 << 20)


def kinds(launch: simgpu.Launch) -> list[str]:
    return [hazard.kind for hazard in launch.hazards]


def test_global_memory(program: simgpu.Program, device: simgpu.Device) -> None:
    n = 1000
    x, y = RNG.standard_normal((2, n)).astype(np.float32)
    a, b, c = device.array(x), device.array(y), device.empty(n, np.float32)
    launch = program.launch("vadd", 8, 128, [a, b, c, n], device).clean()
    assert (c.get() == x + y).all()
    assert launch.totals["global"]["load"] == {
        "requests": 64,
        "sectors": 250,
        "bytes": 8000,
        "lines": 64,
        "sector_use": 1.0,
    }
    with pytest.raises(simgpu.SimError, match="out-of-bounds global read"):
        program.launch("vadd", 8, 128, [a, b, c, 1024], device)
    with pytest.raises(simgpu.SimError, match="null-pointer"):
        program.launch("vadd", 8, 128, [0, b, c, n], device)
    launch = program.launch("vadd", 8, 128, [device.empty(n, np.float32), b, c, n], device)
    assert kinds(launch) == ["uninitialised global read"]


@pytest.mark.parametrize("batch", [1, 2])
def test_two_blocks_write_one_byte(program: simgpu.Program, device: simgpu.Device, batch: int) -> None:
    values, out = device.array(np.zeros(1024, np.float32)), device.empty(32, np.float32)
    launch = program.launch("strided", 2, 32, [values, out], device, batch=batch)
    assert kinds(launch) == ["two blocks write the same global byte"]
    assert {launch.hazards[0].thread[:13], launch.hazards[0].other} == {"block (0,0,0)", "block (1,0,0)"}


def test_variables_of_the_module(program: simgpu.Program, device: simgpu.Device) -> None:
    out = device.empty(4, np.int32)
    program.launch("variables", 1, 4, [out], device).clean()
    assert out.get().tolist() == [2, 3, 5, 7]
    addresses = {variable.name: device.zeros(variable.size, np.uint8).ptr for variable in program.variables}
    assert {"counter", "table"} <= addresses.keys()
    program.place_variables(device, addresses)
    program.launch("variables", 1, 4, [out], device).clean()
    assert out.get().tolist() == [0, 0, 0, 0]


def test_block_reduction(program: simgpu.Program, device: simgpu.Device) -> None:
    x = RNG.standard_normal(100000).astype(np.float32)
    a, out = device.array(x), device.zeros(1, np.float32)
    program.launch("reduce", 16, 256, [a, out, len(x)], device).clean()
    assert abs(out.get()[0] - x.astype(float).sum()) < 1e-2
    launch = program.launch("reduce_race", 16, 256, [a, out, len(x)], device)
    assert any(kind.startswith("read after write") for kind in kinds(launch))


def test_divergence(program: simgpu.Program) -> None:
    assert cases.collatz.run(program).totals["divergent_branches"] > 0


@pytest.mark.parametrize("case", [cases.hist, cases.lock, cases.local_array, cases.warp_votes], ids=lambda c: c.kernel)
def test_results(program: simgpu.Program, case: simgpu.Case) -> None:
    case.run(program)


def test_absent_lane(program: simgpu.Program, device: simgpu.Device) -> None:
    launch = program.launch("half_warp_shfl", 1, 32, [device.zeros(64, np.int32)], device)
    assert any("does not take part" in kind for kind in kinds(launch))


def test_endless_loop(program: simgpu.Program, device: simgpu.Device) -> None:
    held, entered = device.array(np.ones(1, np.int32)), device.zeros(1, np.int32)
    with pytest.raises(
        simgpu.SimError, match=r"lock: no end after \d+ turns of the scheduler\n  \d+ lanes, block .* at PTX line"
    ):
        program.launch("lock", 1, 32, [held, entered], device, max_steps=100)


def test_deadlock(device: simgpu.Device) -> None:
    text = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k() { .reg .pred %p<2>; .reg .b32 %r<2>;
 mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 1, 96; ret;
A: bar.sync 2, 96; ret; }
"""
    with pytest.raises(simgpu.SimError, match=r"k: deadlock\n(.*\n)*.*wait at barrier 2 at PTX line 6: bar.sync 2, 96"):
        simgpu.Program(text).launch("k", 1, 64, [], device)


def test_printf_and_assert(program: simgpu.Program, device: simgpu.Device) -> None:
    program.launch("talk", 1, 32, [32], device).clean()
    with pytest.raises(simgpu.SimError, match=r"talk: device assert failed by block \(0,0,0\) thread \(7,0,0\)"):
        program.launch("talk", 1, 32, [7], device)


def test_coalescing(program: simgpu.Program, device: simgpu.Device) -> None:
    args = [device.array(np.zeros(1024, np.float32)), device.zeros(32, np.float32)]
    launch = program.launch("strided", 1, 32, args, device)
    assert launch.totals["global"]["load"]["sectors"] == 32 and launch.totals["global"]["store"]["sectors"] == 4
    assert launch.counters.uncoalesced()[0][0] == 0.125


def test_arguments_are_checked(program: simgpu.Program, device: simgpu.Device) -> None:
    with pytest.raises(TypeError, match="vadd takes 4 arguments, 1 given"):
        program.launch("vadd", 1, 32, [0], device)
    with pytest.raises(TypeError, match="parameter vadd_param_3 has 4 bytes, 8 given"):
        program.launch("vadd", 1, 32, [0, 0, 0, np.int64(1)], device)
    with pytest.raises(KeyError, match="2 kernels match 'reduc'"):
        program.launch("reduc", 1, 32, [], device)
    with pytest.raises(ValueError, match="one to three positive sizes, not 0"):
        program.launch("vadd", 0, 32, [0, 0, 0, 0], device)
    with pytest.raises(MemoryError, match="2097152 bytes do not fit"):
        device.empty(2 << 20, np.uint8)
