"""HostPool and Tensor: a state machine against a model, a training step's allocations replayed, DLPack, lifetimes."""

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import narrowgauge as ng
import numpy as np
import pytest
import torch
import training_trace
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule
from narrowgauge.memory import size_in_bytes

PAGE = 4096
HUGE = 2 << 20


def pages(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE


class DictSink:
    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}

    def put(self, key: int, data: memoryview) -> None:
        assert data.readonly and key not in self.kept
        self.kept[key] = bytes(data)

    def get(self, key: int, data: memoryview) -> None:
        data[:] = self.kept[key]


class PoolMachine(RuleBasedStateMachine):
    """Blocks filled with a value of their own, beside a model that knows which of them live."""

    tensors = Bundle("tensors")
    LIMIT = 24 * HUGE

    @initialize()
    def make(self) -> None:
        self.pool = ng.HostPool(self.LIMIT)
        self.live: dict[int, tuple[np.ndarray, int]] = {}  # by address: an array of the memory, its value
        self.in_use = self.peak = self.made = 0

    @rule(
        target=tensors,
        size=st.one_of(
            st.integers(1, 20 * PAGE),
            st.integers(1, 4 * HUGE),
            st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 16 * PAGE, 16 * PAGE + 1, HUGE]),
        ),
    )
    def allocate(self, size: int) -> int:
        """Returns the address, or 0 where the pool refuses."""
        if self.pool.is_asleep:
            with pytest.raises(ValueError, match="asleep"):
                self.pool.empty(size, "u8")
            return 0
        if self.in_use + pages(size) > self.LIMIT:
            with pytest.raises(MemoryError, match=f"cannot allocate {size} bytes.*limit"):
                self.pool.empty(size, "u8")
            return 0
        array = np.from_dlpack(self.pool.empty(size, "u8"))
        address = array.ctypes.data
        assert address % PAGE == 0
        for other, (held, _) in self.live.items():
            assert address + size <= other or other + held.size <= address
        self.made += 1
        array[:] = self.made % 251
        self.live[address] = (array, self.made % 251)
        self.in_use += pages(size)
        self.peak = max(self.peak, self.in_use)
        return address

    @rule(address=consumes(tensors), in_thread=st.booleans())
    def free(self, address: int, in_thread: bool) -> None:
        if address == 0:
            return
        array, value = self.live.pop(address)
        if not self.pool.is_asleep:
            assert (array == value).all()
        self.in_use -= pages(array.size)
        holder = [array]
        del array
        if in_thread:
            thread = threading.Thread(target=holder.clear)
            thread.start()
            thread.join()
        else:
            holder.clear()

    @rule()
    def trim(self) -> None:
        reserved = self.pool.statistics().reserved
        given = self.pool.trim()
        assert given % HUGE == 0
        assert self.pool.statistics().reserved == reserved - given
        if not self.pool.is_asleep:
            assert self.pool.trim() == 0

    @precondition(lambda self: not self.pool.is_asleep)
    @rule(discard=st.booleans())
    def sleep(self, discard: bool) -> None:
        self.kept = not discard
        if discard:
            self.pool.sleep()
        else:
            self.pool.sleep(discard=False, sink=DictSink())

    @precondition(lambda self: self.pool.is_asleep)
    @rule()
    def wake(self) -> None:
        self.pool.wake()
        for array, value in self.live.values():
            if not self.kept:
                assert not array.any()
                array[:] = value
            assert (array == value).all()

    @invariant()
    def counts_are_the_models(self) -> None:
        counts = self.pool.statistics()
        assert (counts.in_use, counts.peak, counts.blocks) == (self.in_use, self.peak, len(self.live))
        assert counts.in_use <= self.LIMIT
        assert counts.reserved >= counts.in_use + counts.cached
        assert counts.largest_free <= counts.reserved - counts.in_use
        assert 0 <= counts.fragmentation <= 1
        assert counts.bad_frees == 0

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        if self.pool.is_asleep:
            self.pool.wake()
            for array, value in self.live.values():
                array[:] = value
        for array, value in self.live.values():
            assert (array == value).all()
        array = None
        self.live.clear()
        assert self.pool.statistics().in_use == 0
        self.pool.trim()
        assert self.pool.statistics().reserved == 0


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


@pytest.mark.filterwarnings("ignore")
def test_a_training_step_is_served() -> None:
    trace = training_trace.record()
    assert len(trace.events) > 500 and any(event.age == 1 for event in trace.events)
    pool = ng.HostPool()
    kept = [pool.empty(size, "u8") for size in trace.kept]
    slots: list[dict[int, ng.Tensor]] = [{}, {}]
    reserved = 0
    for iteration in range(5):
        slots.reverse()
        for event in trace.events:
            if event.size:
                tensor = pool.empty(event.size, "u8")
                np.from_dlpack(tensor)[:: PAGE // 2] = event.slot % 251
                slots[0][event.slot] = tensor
                continue
            tensor = slots[event.age].pop(event.slot, None)
            if tensor is not None:
                assert (np.from_dlpack(tensor)[:: PAGE // 2] == event.slot % 251).all()
            else:
                assert iteration == 0 and event.age == 1
        if iteration == 1:
            reserved = pool.statistics().reserved
    del tensor
    counts = pool.statistics()
    assert counts.reserved == reserved  # later steps are served from what the first ones had
    assert counts.reserved <= 1.25 * counts.peak + 2 * HUGE
    assert counts.blocks == len(kept) + len(slots[0])
    del kept, slots
    assert pool.statistics().in_use == 0
    assert pool.trim() == counts.reserved


DTYPES = "bfloat16 float16 float32 float64 bool uint8 int8 uint16 int16 uint32 int32 uint64 int64"


@pytest.mark.parametrize("name", DTYPES.split())
def test_torch_shares_the_memory(name: str) -> None:
    dtype = getattr(torch, name)
    pool = ng.HostPool()
    tensor = pool.empty((3, 5), dtype)
    assert (tensor.shape, tensor.device, tensor.nbytes) == ((3, 5), "cpu", 15 * dtype.itemsize)
    assert tensor.dtype == name and pool.empty(1, name).dtype == name
    shared = torch.from_dlpack(tensor)
    assert shared.dtype is dtype and shared.shape == (3, 5) and shared.data_ptr() == tensor.data_ptr()
    shared.copy_(torch.arange(15).reshape(3, 5))
    del tensor
    gc.collect()
    assert pool.statistics().blocks == 1
    row = shared[1]
    del shared
    assert torch.equal(row, torch.arange(5, 10).to(dtype))
    del row
    assert pool.statistics().blocks == 0


def test_numpy_shares_the_memory() -> None:
    pool = ng.HostPool()
    for dtype in ("f32", "float32", np.float32, np.dtype("float32")):
        tensor = pool.empty(7, dtype)
        array = np.from_dlpack(tensor)
        assert array.dtype == np.float32 and array.ctypes.data == tensor.data_ptr() and array.flags.writeable
        array[:] = 3
        assert np.from_dlpack(tensor).sum() == 21
    copy = np.from_dlpack(tensor, copy=True)
    assert copy.ctypes.data != tensor.data_ptr() and copy.sum() == 21
    with pytest.raises(BufferError, match="DLPack device"):
        tensor.__dlpack__(dl_device=(2, 0))
    with pytest.raises(ValueError, match="stream"):
        tensor.__dlpack__(stream=1)  # type: ignore[arg-type]


def test_scalars_and_tensors_without_elements() -> None:
    pool = ng.HostPool()
    assert torch.from_dlpack(pool.empty((), "i64")).shape == ()
    for shape in ((0,), (4, 0, 2)):
        tensor = pool.empty(shape, "bf16")
        assert torch.from_dlpack(tensor).shape == shape and tensor.nbytes == 0
        assert np.from_dlpack(pool.empty(shape, "i8")).shape == shape
    assert pool.statistics().in_use == 0


def test_capsules_nobody_consumes_free_what_they_hold() -> None:
    pool = ng.HostPool()
    for arguments in ({}, {"max_version": (0, 8)}, {"max_version": (1, 1)}, {"max_version": (2, 0), "copy": True}):
        capsule = pool.empty(5, "f32").__dlpack__(**arguments)  # type: ignore[arg-type]
        versioned = arguments.get("max_version", (0, 0)) >= (1, 0)
        assert ("dltensor_versioned" in repr(capsule)) == versioned
        assert pool.statistics().blocks == ("copy" not in arguments)
        del capsule
        assert pool.statistics().blocks == 0


class Legacy:
    """A producer, or a view of one, as it was before DLPack 1."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack__(self, stream: None = None) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_arrays_come_in_by_dlpack() -> None:
    for wrap in (lambda array: array, Legacy):
        source = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        tensor = ng.Tensor.from_dlpack(wrap(source[:, ::2]))
        assert tensor.data_ptr() == source.data_ptr() and tensor.shape == (4, 3) and not tensor.read_only
        del source
        gc.collect()
        back = torch.from_dlpack(tensor)
        del tensor
        assert torch.equal(back, torch.arange(0, 24, 2, dtype=torch.float32).reshape(4, 3))
    narrow = torch.ones(5, dtype=torch.bfloat16)
    assert torch.from_dlpack(ng.Tensor.from_dlpack(narrow)).data_ptr() == narrow.data_ptr()
    transposed = ng.Tensor.from_dlpack(np.arange(6).reshape(2, 3).T)
    assert np.array_equal(np.from_dlpack(transposed), np.arange(6).reshape(2, 3).T)
    assert np.array_equal(np.from_dlpack(transposed, copy=True), np.arange(6).reshape(2, 3).T)


def test_arrays_that_cannot_come_in() -> None:
    with pytest.raises(TypeError, match="got a list"):
        ng.Tensor.from_dlpack([1])
    with pytest.raises(TypeError, match="complex64"):
        ng.Tensor.from_dlpack(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(BufferError):
        ng.Tensor.from_dlpack(torch.zeros(2, requires_grad=True))
    with pytest.raises(ValueError, match="9 axes"):
        ng.Tensor.from_dlpack(np.zeros((1,) * 9))


def test_read_only_arrays_stay_so() -> None:
    source = np.arange(3)
    source.flags.writeable = False
    tensor = ng.Tensor.from_dlpack(source)
    assert tensor.read_only and not np.from_dlpack(tensor).flags.writeable
    assert np.from_dlpack(tensor, copy=True).flags.writeable
    with pytest.raises(BufferError, match="read-only"):
        tensor.__dlpack__()


def test_what_comes_in_is_released_with_the_last_view() -> None:
    pool = ng.HostPool()
    outer = ng.Tensor.from_dlpack(ng.Tensor.from_dlpack(pool.empty(100, "u8")))
    array = np.from_dlpack(outer)
    del outer
    assert pool.statistics().blocks == 1
    del array
    assert pool.statistics().blocks == 0


def test_the_last_view_dies_in_another_thread() -> None:
    pool = ng.HostPool()
    held = [torch.from_dlpack(pool.empty(1 << 20, "f32")) for _ in range(8)]
    threads = [threading.Thread(target=held.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pool.statistics().blocks == 0


def test_tensors_outlive_the_pool_object() -> None:
    shared = torch.from_dlpack(ng.HostPool().empty((1000, 1000), "f32"))
    gc.collect()
    assert shared.fill_(2).sum() == 2e6


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stderr == "", result.stderr


@pytest.mark.parametrize("state", ["", "pool.sleep(discard=False, sink=Sink())"])
def test_tensors_live_at_interpreter_exit(state: str) -> None:
    run(f"""
import sys, threading, narrowgauge as ng, numpy as np, torch
class Sink:
    def put(self, key, data): self.kept = bytes(data)
    def get(self, key, data): pass
pool = ng.HostPool("1GiB")
held = [pool.empty(5, "f32"), torch.from_dlpack(pool.empty(1 << 20, "f32")), np.from_dlpack(pool.empty(5, "f32"))]
held.append(held)                         # a cycle
sys.modules["held"] = held                # outlives this module
torch.held = torch.from_dlpack(pool.empty(7, "f32"))
capsule = pool.empty(3, "bf16").__dlpack__()
thread = threading.Thread(target=lambda: held.append(pool.empty(1, "u8")))
thread.start()
thread.join()
{state}
""")


def test_a_forked_child_has_its_own_memory() -> None:
    run("""
import os, narrowgauge as ng, numpy as np
pool = ng.HostPool("1GiB")
array = np.from_dlpack(pool.empty(5 << 20, "u8"))
array[:] = 1
child = os.fork()
if child == 0:
    fresh = np.from_dlpack(pool.empty(5 << 20, "u8"))
    fresh[:] = 3
    good = (array == 1).all()
    array[:] = 2
    del array, fresh
    pool.trim()
    os._exit(0 if good and pool.statistics().in_use == 0 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (array == 1).all() and pool.statistics().blocks == 1
""")


def test_sleep_hands_contents_to_a_sink() -> None:
    pool = ng.HostPool()
    shared = torch.from_dlpack(pool.empty(3 * HUGE, "u8")).fill_(7)
    address = shared.data_ptr()
    with pytest.raises(ValueError, match="needs a sink"):
        pool.sleep(discard=False)
    with pytest.raises(ValueError, match="discard=True keeps nothing"):
        pool.sleep(sink=DictSink())
    pool.sleep(discard=False, sink=DictSink())
    assert pool.is_asleep and pool.huge_page_bytes() == 0
    with pytest.raises(ValueError, match="asleep"):
        pool.sleep()
    pool.wake()
    assert shared.data_ptr() == address and (shared == 7).all()
    with pytest.raises(ValueError, match="awake"):
        pool.wake()


def test_a_sink_that_raises() -> None:
    class Broken(DictSink):
        broken: str

        def put(self, key: int, data: memoryview) -> None:
            if self.broken == "put":
                raise OSError(28, "no room")
            super().put(key, data)

        def get(self, key: int, data: memoryview) -> None:
            if self.broken == "get":
                raise OSError(5, "cannot read")
            super().get(key, data)

    pool = ng.HostPool()
    shared = torch.from_dlpack(pool.empty(100, "u8")).fill_(7)
    sink = Broken()
    sink.broken = "put"
    with pytest.raises(OSError, match="no room"):
        pool.sleep(discard=False, sink=sink)
    assert not pool.is_asleep and (shared == 7).all()
    with pytest.raises(AttributeError, match="put"):
        pool.sleep(discard=False, sink=object())  # type: ignore[arg-type]
    sink.broken = "get"
    pool.sleep(discard=False, sink=sink)
    with pytest.raises(OSError, match="cannot read"):
        pool.wake()
    assert pool.is_asleep
    sink.broken = ""
    pool.wake()
    assert (shared == 7).all()


def test_views_of_a_sink_end_with_the_call() -> None:
    class Keeper(DictSink):
        def put(self, key: int, data: memoryview) -> None:
            super().put(key, data)
            self.view = data

    pool, sink = ng.HostPool(), Keeper()
    tensor = pool.empty(100, "u8")
    pool.sleep(discard=False, sink=sink)
    with pytest.raises(ValueError, match="released"):
        sink.view[0]
    pool.wake()
    assert tensor.nbytes == 100


def test_sizes() -> None:
    expected = {"8GiB": 8 << 30, "512MiB": 512 << 20, "1.5GB": 1_500_000_000, " 4096 ": 4096, "10 kB": 10_000}
    expected |= {"0.5KiB": 512, "1TiB": 1 << 40, "3B": 3}
    for text, size in expected.items():
        assert size_in_bytes(text, "limit") == size
        assert ng.HostPool(text).limit == size
    assert ng.HostPool(5).limit == 5 and ng.HostPool().limit is None
    for bad in ("", "8Gb", "GiB", "-1GiB", "1e9", "8 GiB GiB", "0", "0.1B", 0, -1, 1 << 63, "٣GiB"):
        with pytest.raises(ValueError, match="limit is .*expected"):
            ng.HostPool(bad)
    for wrong in (1.5, True, b"8GiB"):
        with pytest.raises(TypeError, match="limit is a"):
            ng.HostPool(wrong)  # type: ignore[arg-type]


def test_arguments_are_checked() -> None:
    pool = ng.HostPool("1MiB")
    for dtype in ("fp8", torch.complex64, np.complex64, object, float):
        with pytest.raises(TypeError, match="unknown dtype .*bfloat16"):
            pool.empty(3, dtype)
    with pytest.raises(ValueError, match="-1"):
        pool.empty((2, -1), "f32")
    with pytest.raises(ValueError, match="64 bits"):
        pool.empty((1 << 40, 1 << 40), "f32")
    with pytest.raises(MemoryError, match="cannot allocate 8388608 bytes.*limit is 1048576.*in use 0 bytes"):
        pool.empty(1 << 20, "f64")
    nodes = ng._native.numa_nodes()
    assert ng.HostPool(numa_node=nodes[-1]).empty(3, "f32").nbytes == 12
    with pytest.raises(ValueError, match="no NUMA node 77"):
        ng.HostPool(numa_node=77)
    assert repr(pool.empty((2, 3), "bf16")) == "Tensor(shape=[2, 3], dtype=bfloat16, device=cpu)"


def test_huge_pages_are_asked_for() -> None:
    off = ng.HostPool(huge_pages=False)
    tensors = [off.empty(8 * HUGE, "u8")]
    assert off.huge_page_bytes() == 0
    on = ng.HostPool()
    tensors.append(on.empty(8 * HUGE, "u8"))
    assert 0 <= on.huge_page_bytes() <= on.statistics().reserved
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        assert on.huge_page_bytes() == 0


def test_many_threads() -> None:
    pool = ng.HostPool("256MiB")
    failures: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        held: list[tuple[np.ndarray, int]] = []
        for _ in range(300):
            if held and random.random() < 0.5:
                array, value = held.pop(int(random.integers(len(held))))
                if not (array == value).all():
                    failures.append(f"{seed}: {value}")
                continue
            value = int(random.integers(256))
            array = np.from_dlpack(pool.empty(int(random.integers(1, 40 * PAGE)), "u8"))
            array[:] = value
            held.append((array, value))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.statistics().in_use == 0 and pool.statistics().bad_frees == 0
