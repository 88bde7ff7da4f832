"""The API in one page: quantize a matrix, multiply by it, save it, and narrow a whole model."""

import tempfile
from pathlib import Path

import narrowgauge as ng
import torch

torch.manual_seed(0)

# A matrix. fp6 is short for fp6_e2m3:g128:fp16: 6-bit floats, an fp16 scale for each 128 of a row.
w = torch.randn(1024, 512)
q = ng.quantize(w, ng.fp6).pack()  # packed for this CPU: no longer portable, fast
print(q, f"{w.numel() * 4 / q.nbytes:.2f}x fewer bytes than fp32")

x = torch.randn(8, 512)
y = ng.linear(x, q)  # y = x @ w.T
error = (y - x @ w.T).norm() / (x @ w.T).norm()
print(f"relative error of the product: {error:.4f}")
assert error < 0.05

# A file that every safetensors reader opens; what comes back is the same, bit for bit.
with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / "w.safetensors"
    q.save(path)
    assert torch.equal(ng.QTensor.load(path).dequantize(), q.dequantize())


# A model: its linear layers become narrow in place, each format where its pattern matches.
class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(512, 1024)
        self.down = torch.nn.Linear(1024, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


model = torch.nn.Sequential(Block(), Block()).eval()
print(ng.quantize_model(model, {"down": ng.int8, "*": ng.fp6}))

with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
    ng.save_model(model, directory)
    with torch.device("meta"):  # no memory, no initialisation: the file fills it
        other = torch.nn.Sequential(Block(), Block()).eval()
    ng.load_model(directory, other)
    assert torch.equal(other(x), model(x))
