"""What bench/linear.py measures narrowgauge against: torch's own ops, and ONNX Runtime, OpenVINO and ggml where they
are installed (`pip install onnxruntime onnx openvino`, `pip install ggml_py`, which compiles; none is needed to run).

Each function takes the weights [N, K] and how many gigabytes of copies to rotate, and returns Cases by name. A peer
that is not there raises ImportError, which the caller reports as absent.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

GROUP = 128


class Case:
    """A kernel over rotating copies of its weights. `dtype`: of the x that it takes."""

    def __init__(
        self,
        weights: list[Any],
        call: Callable[[torch.Tensor, Any], Any],
        nbytes: int,
        dtype: torch.dtype = torch.bfloat16,
        first: float = 0.0,
    ) -> None:
        self.weights, self.call, self.nbytes, self.dtype = weights, call, nbytes, dtype
        # Where in the rotation it starts, so that kernels with the same weights do not find each other's in a cache.
        self.first = int(first * len(weights))

    def bind(self, x: torch.Tensor) -> Callable[[int], object]:
        weights, call, first = self.weights, self.call, self.first
        with all_cores():
            for each in weights:  # once, since some libraries prepare at the first call of a shape
                call(x, each)
        return lambda number: call(x, weights[(number + first) % len(weights)])


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """A library's threads that start meanwhile may run on all cores, not on the one alone that OpenMP has pinned this
    thread to, and that they would inherit."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(map(int, os.environ.get("GOMP_CPU_AFFINITY", "").split())) or mine)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def copies(nbytes: int, gigabytes: float) -> int:
    """At least two, so that a cache holds no weight by chance alone."""
    return max(2, int(gigabytes * 1e9 / nbytes) + 1)


def _nibbles(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0..15 with the zero point 8 [N, K], and steps [N, groups]."""
    groups = w.reshape(w.shape[0], -1, GROUP)
    step = (groups.abs().amax(-1) / 7).clamp(min=1e-8)
    codes = (groups / step[..., None]).round().clamp(-8, 7) + 8
    return codes.to(torch.int32).reshape(w.shape), step


def torch_ops(w: torch.Tensor, gigabytes: float) -> dict[str, Case]:
    n, k = w.shape
    cases = {}
    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        nbytes = n * k * dtype.itemsize
        weights = [w.to(dtype, copy=True) for _ in range(copies(nbytes, gigabytes))]
        cases[name] = Case(weights, torch.nn.functional.linear, nbytes, dtype)

    scale = (w.abs().amax(1) / 127).to(torch.bfloat16)
    codes = (w / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
    int8 = [(codes.clone(), scale) for _ in range(copies(n * k, gigabytes))]
    cases["torch int8pack"] = Case(int8, lambda x, q: torch.ops.aten._weight_int8pack_mm(x, *q), n * k + 2 * n)

    scales, zeros = scale.double(), torch.zeros(n, dtype=torch.int64)
    quantized = torch.quantize_per_channel(w, scales, zeros, 0, torch.qint8)
    packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(copies(n * k, gigabytes))]
    cases["torch int8 dynamic"] = Case(
        packed, lambda x, q: torch.ops.quantized.linear_dynamic(x, q, True), n * k + 4 * n, torch.float32
    )

    if k % GROUP == 0 and n % 32 == 0:
        quarters, step = _nibbles(w)
        block = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quarters, 1)
        pairs = torch.stack([step.T, torch.zeros_like(step.T)], -1).to(torch.bfloat16).contiguous()
        int4 = [(block.clone(), GROUP, pairs) for _ in range(copies(n * k // 2, gigabytes))]
        cases["torch int4pack g128"] = Case(
            int4, lambda x, q: torch.ops.aten._weight_int4pack_mm_for_cpu(x, *q), n * k // 2 + 2 * pairs.numel()
        )
    return cases


def onnxruntime(w: torch.Tensor, gigabytes: float) -> dict[str, Case]:
    """MatMulNBits, 4 bits, g128, accuracy level 4: activations in int8 by blocks. One pool of threads for all."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    n, k = w.shape
    codes, step = _nibbles(w)
    blocks = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).reshape(n, -1, GROUP // 2)
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=GROUP,
        accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(blocks.numpy(), "b"), numpy_helper.from_array(step.float().numpy(), "s")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.use_per_session_threads = False
    ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    nbytes = n * k // 2 + 4 * step.numel()
    sessions = [
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(copies(nbytes, gigabytes))
    ]
    call = lambda x, session: session.run(None, {"x": x.numpy()})  # noqa: E731
    return {"onnxruntime int4 g128": Case(sessions, call, nbytes, torch.float32)}


def openvino(w: torch.Tensor, gigabytes: float) -> dict[str, Case]:
    """u4 weights g128 and int8 weights by row, both with fp16 scales, decompressed by its plugin; its own threads."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    n, k = w.shape
    core = ov.Core()
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}

    def case(weights: Any, nbytes: int) -> Case:
        x = ops.parameter([-1, k], ov.Type.f32)
        decoded = ops.convert(ops.reshape(weights, ops.constant([n, k]), False), "f32")
        model = ov.Model([ops.matmul(x, decoded, False, True)], [x])
        requests = [
            core.compile_model(model, "CPU", config).create_infer_request() for _ in range(copies(nbytes, gigabytes))
        ]
        return Case(requests, lambda x, request: request.infer([x.numpy()]), nbytes, torch.float32)

    codes, step = _nibbles(w)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).numpy()
    tensor = ov.Tensor(packed, ov.Shape([n, k // GROUP, GROUP]), ov.Type.u4)
    nibbles = ops.subtract(ops.convert(ops.constant(tensor), "f16"), ops.constant(np.float16(8)))
    nibbles = ops.multiply(nibbles, ops.constant(step.half().numpy()[..., None]))

    scale = (w.abs().amax(1, keepdim=True) / 127).half()
    codes = (w / scale.float()).round().clamp(-127, 127).to(torch.int8)
    octets = ops.multiply(ops.convert(ops.constant(codes.numpy()), "f16"), ops.constant(scale.numpy()))
    return {
        "openvino u4 g128": case(nibbles, n * k // 2 + 2 * step.numel()),
        "openvino int8": case(octets, n * k + 2 * n),
    }


# --- ggml -----------------------------------------------------------------------------------------------------------

_GGML_TYPES = {"ggml Q8_0": (8, 34, 32), "ggml Q6_K": (14, 210, 256), "ggml Q4_0": (2, 18, 32)}  # type, bytes, block


def _ggml_library() -> ctypes.CDLL:
    """The libraries that ggml_py brings, loaded without the package."""
    import importlib.util

    spec = importlib.util.find_spec("ggml")
    if spec is None or spec.origin is None:
        raise ImportError("no module ggml")
    folder = os.path.join(os.path.dirname(spec.origin), "lib")
    loaded = None
    for name in ("libggml-base.so", "libggml-cpu.so", "libggml.so"):
        loaded = ctypes.CDLL(os.path.join(folder, name), ctypes.RTLD_GLOBAL)
    assert loaded is not None
    return loaded


def ggml(w: torch.Tensor, gigabytes: float) -> dict[str, Case]:
    """ggml_mul_mat of quantised weights and fp32 x on its CPU backend, a graph for each copy and number of rows."""
    library = _ggml_library()
    pointer, size = ctypes.c_void_p, ctypes.c_size_t

    class Params(ctypes.Structure):
        _fields_ = (("mem_size", size), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool))

    def function(name: str, result: Any, *arguments: Any) -> Any:
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found

    init = function("ggml_init", pointer, Params)
    new = function("ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    product = function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    graph_of = function("ggml_new_graph", pointer, pointer)
    expand = function("ggml_build_forward_expand", None, pointer, pointer)
    data_of = function("ggml_get_data", pointer, pointer)
    quantize = function(
        "ggml_quantize_chunk", size, ctypes.c_int, pointer, pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        pointer,
    )  # fmt: skip
    backend_of = function("ggml_backend_cpu_init", pointer)
    set_threads = function("ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)
    compute = function("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
    backend = backend_of()
    set_threads(backend, torch.get_num_threads())

    n, k = w.shape
    cases = {}
    for name, (kind, block_bytes, block) in _GGML_TYPES.items():
        if k % block:
            continue
        nbytes = n * k // block * block_bytes
        codes = torch.empty(nbytes, dtype=torch.uint8)
        quantize(kind, w.contiguous().data_ptr(), codes.data_ptr(), 0, n, k, None)
        count = copies(nbytes, gigabytes)
        context = init(Params(count * (nbytes + 4096) + (1 << 20), None, False))
        matrices = []
        for _ in range(count):
            matrices.append(new(context, kind, k, n))
            ctypes.memmove(data_of(matrices[-1]), codes.data_ptr(), nbytes)
        graphs: dict[tuple[int, int], tuple[Any, int, torch.Tensor]] = {}

        def call(x: torch.Tensor, matrix: int, graphs: dict[tuple[int, int], Any] = graphs) -> torch.Tensor:
            key = (len(x), matrix)
            if key not in graphs:
                memory = init(Params((1 << 20) + len(x) * (k + n) * 4, None, False))
                rows = new(memory, 0, k, len(x))
                graph = graph_of(memory)
                result = product(memory, matrix, rows)
                expand(graph, result)
                floats = (ctypes.c_float * (len(x) * n)).from_address(data_of(result))
                graphs[key] = (graph, data_of(rows), torch.frombuffer(floats, dtype=torch.float32).view(len(x), n))
            graph, target, y = graphs[key]
            ctypes.memmove(target, x.data_ptr(), x.numel() * 4)
            compute(backend, graph)
            return y  # type: ignore[no-any-return]

        cases[name] = Case(matrices, call, nbytes, torch.float32)
    return cases


PEERS = {"onnxruntime": onnxruntime, "openvino": openvino, "ggml": ggml}
