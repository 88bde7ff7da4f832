"""What a user with numpy and nothing else does. Run by tests/wheel/run in each clean environment."""

import importlib.util
import sys
import tempfile
from pathlib import Path

import narrowgauge as ng
import numpy as np

assert importlib.util.find_spec("torch") is None, "this environment is meant to have no torch"

rng = np.random.default_rng(0)
weights = rng.standard_normal((192, 576), dtype=np.float32)
x = rng.standard_normal((3, 576), dtype=np.float32)

for name in ("fp8", "fp6", "fp5", "fp4", "int8", "int4", "nf4", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "uint4:g64:fp16"):
    q = ng.quantize(weights, ng.Format(name))
    decoded = np.asarray(q.dequantize())
    y = ng.linear(x, q.pack("cpu"))
    assert isinstance(y, np.ndarray) and y.shape == (3, 192), name
    np.testing.assert_allclose(y, x @ decoded.T, rtol=1e-3, atol=1e-3, err_msg=name)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "weights.safetensors"
    q.save(path)
    np.testing.assert_array_equal(np.asarray(ng.QTensor.load(path).dequantize()), decoded)

try:
    ng.linear(x[:, :-1], q)
except ValueError as error:
    message = str(error)
else:
    raise AssertionError("a row that is too short was accepted")
assert "575" in message and "576" in message, message

assert "numpy" in sys.modules and "torch" not in sys.modules
print(f"narrowgauge {ng.__version__} works on Python {sys.version.split()[0]} with numpy {np.__version__}")
