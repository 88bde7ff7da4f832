"""Format, quantize and QTensor: forms, copies, files, both array libraries."""

import contextlib
import copy
import pickle
from pathlib import Path

import ml_dtypes
import narrowgauge as ng
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from narrowgauge import _native
from narrowgauge.qtensor import Canonical

FORMATS = [*ng.format_aliases(), "uint4:g64:bf16", "int3:g32:fp16", "fp7_e3m3", "uint8:row:fp32", "int2:g16:e8m0"]


def same_bits(a: object, b: object) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, torch.Tensor):
        a, b = a.contiguous().view(torch.uint8).numpy(), b.contiguous().view(torch.uint8).numpy()
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def same_canonical(a: ng.QTensor, b: ng.QTensor) -> bool:
    return all(same_bits(x, y) for x, y in zip(a.canonical(), b.canonical(), strict=True))


def test_format_is_a_value() -> None:
    format = ng.Format("fp6")
    assert str(format) == "fp6_e2m3:g128:fp16" == str(ng.fp6)
    assert repr(format) == "Format('fp6_e2m3:g128:fp16')"
    assert format == ng.fp6 and hash(format) == hash(ng.fp6) and format != ng.fp8
    assert format != "fp6" and {ng.fp6: 1}[format] == 1
    assert pickle.loads(pickle.dumps(format)) == format == copy.deepcopy(format) == ng.Format(format)
    assert (format.bits, format.exponent_bits, format.mantissa_bits, format.group) == (6, 2, 3, 128)
    assert (format.element, format.kind, format.scale, format.max) == ("fp6_e2m3", "fp", "fp16", 7.5)
    assert format.bits_per_weight() == 6.125 and format.groups(129) == 2 and format.row_bytes(3) == 3
    assert len(format.values()) == 64
    assert type(format).__module__ == "narrowgauge"


def test_bad_format_names_the_part() -> None:
    with pytest.raises(ValueError, match="g17"):
        ng.Format("fp6_e2m3:g17:fp16")
    with pytest.raises(TypeError):
        ng.Format(3)
    with pytest.raises(AttributeError):
        ng.fp6.group = 3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(48, 144), (5, 33), (2, 3, 40), (7,)])
def test_packing_keeps_every_bit(format: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    q, p = ng.quantize(w, format), ng.quantize(w, format)
    assert q.shape == shape and not q.is_packed
    assert p.pack() is p and p.is_packed and p.pack("cpu") is p
    assert p.packed.dtype == torch.uint8 and p.packed.data_ptr() % 64 == 0
    assert same_canonical(p, q)
    assert torch.equal(p.dequantize(), q.dequantize())
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(p.dequantize(dtype), q.dequantize(dtype)) and q.dequantize(dtype).dtype == dtype
    assert p.nbytes == q.nbytes == sum(a.numel() * a.element_size() for a in q.canonical() if a is not None)
    assert p.unpack() is p and not p.is_packed and same_canonical(p, q)


@pytest.mark.parametrize("format", FORMATS)
def test_numpy_and_torch_agree(format: str) -> None:
    w = np.random.default_rng(0).standard_normal((20, 100), dtype=np.float32)
    n, t = ng.quantize(w, format), ng.quantize(torch.from_numpy(w), format)
    for a, b in zip(n.canonical(), t.canonical(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.tobytes() == b.view(torch.uint8).numpy().tobytes()
    assert np.array_equal(n.dequantize(), t.dequantize().numpy())
    assert n.pack().packed.ctypes.data % 64 == 0
    assert np.array_equal(n.dequantize("float16"), t.dequantize(torch.float16).numpy())
    assert isinstance(n.codes, np.ndarray)


def test_numpy_bfloat16() -> None:
    w = np.random.default_rng(0).standard_normal((16, 64)).astype(ml_dtypes.bfloat16)
    q = ng.quantize(w, "int8:g64:bf16")
    assert q.scales.dtype == ml_dtypes.bfloat16
    t = ng.quantize(torch.from_numpy(w.astype(np.float32)).bfloat16(), "int8:g64:bf16")
    assert q.codes.tobytes() == t.codes.numpy().tobytes()
    d = q.dequantize("bfloat16")
    assert d.dtype == ml_dtypes.bfloat16
    assert np.array_equal(d.astype(np.float32), t.dequantize(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_strides(dtype: torch.dtype) -> None:
    base = torch.randn(64, 48).to(dtype)
    for view in (base.T, base[::2], base[:, ::3], base.reshape(8, 8, 48)[:, 2:5], base[:, 5:37]):
        assert same_canonical(ng.quantize(view, ng.fp6), ng.quantize(view.clone().contiguous(), ng.fp6))
    flipped = np.flip(np.arange(64, dtype=np.float32).reshape(4, 16), axis=1)
    assert same_canonical(ng.quantize(flipped, ng.int8), ng.quantize(flipped.copy(), ng.int8))


def test_negative_bit_and_gradients() -> None:
    z = torch.randn(4, 16, dtype=torch.complex64)
    imaginary = z.conj().imag
    assert imaginary.is_neg()
    assert same_canonical(ng.quantize(imaginary, ng.int8), ng.quantize(imaginary.clone().resolve_neg(), ng.int8))
    with pytest.raises(TypeError, match="w has dtype complex64"):
        ng.quantize(z, ng.int8)
    assert same_canonical(ng.quantize(torch.nn.Parameter(z.real), ng.int8), ng.quantize(z.real, ng.int8))


@pytest.mark.parametrize("shape", [(0, 16), (16, 0), (0, 0), (3, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    for w in (torch.zeros(shape), np.zeros(shape, np.float32)):
        q = ng.quantize(w, ng.fp6)
        assert tuple(q.dequantize().shape) == shape == tuple(q.pack().dequantize().shape)


def test_options() -> None:
    w = torch.randn(16, 128)
    plain, best = ng.quantize(w, ng.int4), ng.quantize(w, ng.int4, search="mse")
    assert (best.dequantize() - w).norm() <= (plain.dequantize() - w).norm()
    a, b, c = (ng.quantize(w, ng.int4, stochastic=True, seed=seed) for seed in (1, 1, 2**64 - 1))
    assert same_canonical(a, b) and not same_canonical(a, c)
    assert not same_canonical(ng.quantize(w, ng.mxfp4, e8m0_ceil=True), ng.quantize(w, ng.mxfp4))
    w[3, 5] = float("nan")
    with pytest.raises(ValueError, match="389|3, 5"):
        ng.quantize(w, ng.int4)
    assert torch.isfinite(ng.quantize(w, ng.int4, nan="saturate").dequantize()).all()


def test_bad_options() -> None:
    w = torch.randn(4, 16)
    with pytest.raises(ValueError, match="search is 'best', expected 'absmax' or 'mse'"):
        ng.quantize(w, ng.int4, search="best")
    with pytest.raises(ValueError, match="nan is 'ignore', expected 'error' or 'saturate' or 'keep'"):
        ng.quantize(w, ng.int4, nan="ignore")
    with pytest.raises(ValueError, match="seed is -1"):
        ng.quantize(w, ng.int4, stochastic=True, seed=-1)
    with pytest.raises(ValueError, match="at least one axis"):
        ng.quantize(torch.tensor(1.0), ng.int4)
    with pytest.raises(TypeError, match="w is a list"):
        ng.quantize([[1.0]], ng.int4)
    with pytest.raises(ValueError, match="meta"):
        ng.quantize(torch.zeros(2, 2, device="meta"), ng.int4)
    with pytest.raises(TypeError, match="layout"):
        ng.quantize(torch.eye(4).to_sparse(), ng.int4)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        ng.quantize(w, ng.int4).pack("gpu")
    with pytest.raises(TypeError, match="the result has dtype int32"):
        ng.quantize(w, ng.int4).dequantize(torch.int32)


def test_canonical_arrays_are_checked() -> None:
    q = ng.quantize(torch.randn(8, 128), "uint4:g64:bf16")
    codes, scales, zeros, _ = q.canonical()
    make = ng.QTensor.from_canonical
    assert same_canonical(make(q.format, q.shape, q.canonical()), q)
    with pytest.raises(ValueError, match=r"scales has shape \(8, 1\), expected \(8, 2\)"):
        make(q.format, q.shape, Canonical(codes, scales[:, :1], zeros))
    with pytest.raises(TypeError, match="scales has dtype float32, expected bfloat16"):
        make(q.format, q.shape, Canonical(codes, scales.float(), zeros))
    with pytest.raises(ValueError, match="zeros: format .* has one"):
        make(q.format, q.shape, Canonical(codes, scales))
    with pytest.raises(ValueError, match="global_scale: format .* has none"):
        make(q.format, q.shape, Canonical(codes, scales, zeros, torch.ones(1)))


def test_resident_bytes() -> None:
    for format in FORMATS:
        q = ng.quantize(torch.randn(192, 576), format).pack()
        assert q._canonical is None
        assert q.packed.numel() <= 1.02 * q.nbytes, format


@pytest.mark.parametrize("format", ["fp6", "nvfp4", "uint4:g64:bf16", "mxfp4"])
@pytest.mark.parametrize("packed", [False, True])
def test_copies_and_pickles(format: str, packed: bool) -> None:
    for w in (torch.randn(20, 100), np.random.default_rng(0).standard_normal((20, 100), dtype=np.float32)):
        q = ng.quantize(w, format)
        if packed:
            q.pack()
        for other in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            assert other is not q and other.is_packed == packed and same_canonical(other, q)
            assert other.shape == q.shape and other.format == q.format
        deep = copy.deepcopy(q).unpack()
        deep.codes[0, 0] ^= 1
        assert not same_canonical(deep, q) and q.is_packed == packed


def test_repr() -> None:
    q = ng.quantize(torch.randn(4, 128), ng.fp6)
    assert repr(q) == f"QTensor(shape=(4, 128), format='fp6_e2m3:g128:fp16', canonical, nbytes={4 * 96 + 8})"
    assert "packed" in repr(q.pack())
    with pytest.raises(ValueError, match="not packed"):
        _ = q.unpack().packed


@pytest.mark.parametrize("format", FORMATS)
def test_files(format: str, tmp_path: Path) -> None:
    q = ng.quantize(torch.randn(2, 9, 100), format)
    path = tmp_path / "q.safetensors"
    q.pack().save(path)
    for library in ("torch", "numpy"):
        other = ng.QTensor.load(path, library=library)
        assert other.shape == q.shape and other.format == q.format and not other.is_packed
        assert np.array_equal(np.asarray(other.dequantize()), q.dequantize().numpy())
    assert same_canonical(ng.QTensor.load(path), q)
    tensors = safetensors.torch.load_file(path)
    names = {f"weight.{n}" for n, a in zip(Canonical._fields, q.canonical(), strict=True) if a is not None}
    assert set(tensors) == names and same_bits(tensors["weight.codes"], q.codes)
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == names and "narrowgauge" in file.metadata()


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    ng.quantize(torch.randn(16, 128), ng.fp6).save(path, "a")
    with pytest.raises(ValueError, match="no narrow matrix 'b', only"):
        ng.QTensor.load(path, "b")
    with pytest.raises(FileNotFoundError):
        ng.QTensor.load(tmp_path / "absent")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ng.FileCorrupt):
        ng.QTensor.load(path)
    path.write_bytes(data.replace(b"fp6_e2m3:g128:fp16", b"fp6_e2m3:g128:fp61"))
    with pytest.raises(ValueError, match="tensor 'a'.*fp61"):
        ng.QTensor.load(path)
    path.write_bytes(data.replace(b"fp6_e2m3:g128:fp16", b"fp6_e2m3:g128:bf16"))
    with pytest.raises(ng.FileCorrupt, match=r"'a.scales' is F16 .*expected BF16"):
        ng.QTensor.load(path)
    path.write_bytes(data.replace(b"[16,128]", b"[16,129]"))
    with pytest.raises(ng.FileCorrupt, match=r"'a.codes' is U8 \[16, 96\], expected U8 \[16, 97\]"):
        ng.QTensor.load(path)
    path.write_bytes(data.replace(rb"\"version\":1", rb"\"version\":7"))
    with pytest.raises(ValueError, match="version 7"):
        ng.QTensor.load(path)
    path.write_bytes(data.replace(rb"\"version\":1", rb"\"version\"=1"))
    with pytest.raises(ng.FileCorrupt, match="not sound"):
        ng.QTensor.load(path)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not written by narrowgauge"):
        ng.QTensor.load(path)


def test_every_altered_byte_of_a_header_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    ng.quantize(torch.randn(16, 32), ng.nvfp4).save(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    for at in range(header):
        altered = bytearray(data)
        altered[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        with contextlib.suppress(ValueError, OSError, MemoryError):  # FileCorrupt is a ValueError
            ng.QTensor.load(path)


def test_alignment_of_scales_is_checked() -> None:
    q = ng.quantize(torch.randn(16, 128), ng.fp6)
    block = torch.empty(_native.packed_bytes(q.format, 16, 128), dtype=torch.uint8)
    odd = np.zeros(33, np.uint8)[1:]
    odd = odd if odd.ctypes.data % 2 else np.zeros(34, np.uint8)[2:]
    with pytest.raises(ValueError, match="scales are not aligned"):
        _native.pack(q.format, 16, 128, q.codes, odd, None, None, block)
