"""numpy in, numpy out: narrowgauge without torch."""

import narrowgauge as ng
import numpy as np

rng = np.random.default_rng(0)
w = rng.standard_normal((256, 384), dtype=np.float32)
x = rng.standard_normal((4, 384), dtype=np.float32)

print(f"{'format':24}{'bits/weight':>12}{'SQNR dB':>9}{'product error':>15}")
for name in ng.format_aliases():
    q = ng.quantize(w, name)
    noise = w - q.dequantize()
    sqnr = 10 * np.log10((w**2).sum() / (noise**2).sum())
    y = ng.linear(x, q.pack())
    error = np.linalg.norm(y - x @ w.T) / np.linalg.norm(x @ w.T)
    print(f"{q.format!s:24}{q.format.bits_per_weight(384):12.3f}{sqnr:9.2f}{error:15.4f}")
    assert isinstance(y, np.ndarray) and error < 0.2
