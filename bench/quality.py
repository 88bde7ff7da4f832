"""What formats cost in quality: signal to noise of weights and, with --corpus, perplexity of a real model.

    python bench/quality.py --model SmolLM2-135M-Instruct.Q4_1.gguf --png quality.png
    python bench/quality.py --model ... --corpus DIR           # moby.txt, sotu.txt, handbook.txt; half an hour

SQNR = 10 log10(sum w^2 / sum (w - q)^2) over 512 x 4096 Gaussian and Student-t(5) weights and over all linear layers
of the model together, plain and with the scale search. Perplexity: 6 windows of 512 tokens of each text, from
characters 300000, 9000000 and 20000, with the dequantized weights of the linear layers in fp32 layers, so that it is
the format's loss alone. `expected` was measured once by another implementation of the same formats.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import narrowgauge as ng
import protocol
import torch

# Format: expected loss of perplexity in percent, where there is one.
FORMATS: dict[str, float | None] = {
    "int8:row:fp32": 0.15,
    "fp8_e4m3:row:fp32": 1.7,
    "fp8_e4m3:g32:e8m0": None,
    "fp6_e2m3:g128:fp16": 1.3,
    "fp6_e2m3:row:fp32": 2.1,
    "fp6_e2m3:g32:e8m0": 3.7,
    "fp6_e3m2:row:fp32": 4.9,
    "int6:g128:fp16": None,
    "fp5_e2m2:g64:fp16": 5.4,
    "int5:g128:fp16": None,
    "fp4_e2m1:g64:fp16": 35.0,
    "int4:g64:fp16": 51.0,
    "nf4:g64:fp16": None,
    "uint4:g64:fp16": None,
    "fp4_e2m1:g32:e8m0": None,
    "fp4_e2m1:g16:e4m3": None,
}
EXPECTED_FP32 = 29.570
TEXTS = {"moby.txt": 300_000, "sotu.txt": 9_000_000, "handbook.txt": 20_000}
SEARCHES = ["absmax", "mse"]


def linears(model: Any) -> Iterator[torch.nn.Linear]:
    """The block's linear layers: all but the head."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            yield module


def sqnr(weights: list[torch.Tensor], format: str, search: str) -> float:
    signal = noise = 0.0
    for w in weights:
        signal += float(w.double().square().sum())
        noise += float((w.double() - ng.quantize(w, format, search=search).dequantize(torch.float32)).square().sum())
    return 10 * math.log10(signal / noise)


def perplexities(model: Any, windows: torch.Tensor, formats: list[str]) -> dict[str, list[float]]:
    """{"fp32": [value], format: [absmax, mse]}. The model is left as it was."""
    from narrowgauge.evaluate import perplexity

    originals = [module.weight.detach().clone() for module in linears(model)]
    results = {"fp32": [perplexity(model, windows).value]}
    for format in formats:
        results[format] = []
        for search in SEARCHES:
            for module, w in zip(linears(model), originals, strict=True):
                module.weight.data.copy_(ng.quantize(w, format, search=search).dequantize(torch.float32))
            results[format].append(perplexity(model, windows).value)
            print(f"{format} {search}: {results[format][-1]:.3f}", flush=True)
    for module, w in zip(linears(model), originals, strict=True):
        module.weight.data.copy_(w)
    return results


def read_windows(tokenizer: Any, corpus: Path) -> torch.Tensor:
    from narrowgauge.evaluate import cut_windows

    texts = [(corpus / name).read_text(encoding="utf-8")[start:] for name, start in TEXTS.items()]
    return torch.cat([cut_windows(tokenizer, text, 512, 6) for text in texts])


def plot(rows: list[dict[str, Any]], sources: list[str], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sources), figsize=(5 * len(sources), 4.5), sharey=True, layout="constrained")
    for axis, source in zip(axes if len(sources) > 1 else [axes], sources, strict=True):
        for row in rows:
            plain, searched = row[source]
            axis.plot([row["bits"]] * 2, [plain, searched], color="lightgray")
            axis.plot(row["bits"], plain, "o", color="tab:blue")
            axis.plot(row["bits"], searched, "^", color="tab:orange")
            axis.annotate(row["format"], (row["bits"], plain), fontsize=6, xytext=(4, -2), textcoords="offset points")
        axis.set_title(source)
        axis.set_xlabel("bits per weight")
        axis.grid(alpha=0.3)
    figure.supylabel("SQNR in dB: absmax (circle), search (triangle)")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a GGUF file or a model folder")
    parser.add_argument("--corpus", metavar="DIR", type=Path)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--png", metavar="FILE")
    args = parser.parse_args()
    if args.corpus and not args.model:
        parser.error("--corpus needs --model")

    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, 512, 4096, generator=generator)
    sources = {
        "Gaussian": [normal[0]],
        # A normal over the root of a mean of five squares.
        "Student-t(5)": [normal[0] / normal[1:].square().mean(0).sqrt()],
    }
    lm = None
    if args.model:
        from narrowgauge.importers import load_causal_lm

        lm = load_causal_lm(args.model, torch.float32)
        sources["model"] = [module.weight.detach() for module in linears(lm.model)]

    formats = [str(ng.Format(name)) for name in args.formats]
    rows: list[dict[str, Any]] = []
    for format in formats:
        row: dict[str, Any] = {"format": format, "bits": ng.Format(format).bits_per_weight()}
        for source, weights in sources.items():
            row[source] = [sqnr(weights, format, search) for search in SEARCHES]
        rows.append(row)
    protocol.print_table(
        "SQNR in dB, absmax / search",
        ["format", "bits", *sources],
        [[r["format"], f"{r['bits']:.3f}", *(f"{r[s][0]:.2f} / {r[s][1]:.2f}" for s in sources)] for r in rows],
    )
    if args.png:
        plot(rows, list(sources), args.png)

    if args.corpus and lm is not None:
        values = perplexities(lm.model, read_windows(lm.need_tokenizer(), args.corpus), formats)
        base = values["fp32"][0]
        table = [["fp32", f"{base:.3f}", "", f"{EXPECTED_FP32:.3f}", ""]]
        for row in rows:
            format = row["format"]
            row["perplexity"] = values[format]
            losses = [f"{100 * (value / base - 1):+.2f} %" for value in values[format]]
            expected = FORMATS.get(format)
            table.append([format, f"{values[format][0]:.3f}", losses[0], "" if expected is None else f"{expected:+} %"])
            table[-1].append(losses[1])
        protocol.print_table("Perplexity", ["format", "perplexity", "loss", "expected", "with search"], table)
    protocol.print_machine()
    if args.json:
        protocol.write_json(args.json, rows)


if __name__ == "__main__":
    main()
