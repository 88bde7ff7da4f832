"""The demo: one real model in several formats, each with its bytes, its perplexity and its speed in decoding; or a
slice of the model with its narrow layers on a GPU.

run() measures and returns; it prints nothing. Perplexity is taken with fp32 activations, through the narrow layers
themselves. Decoding is timed with all that is not narrow (embedding, norms, attention, head, key-value cache) in bf16
and again in fp32, for the narrow rows as for torch's, and the better of the two counts. All models decode in turns,
in one process, with the same loop and the same threads.

run_on_gpu() compares and times nothing: the products of the narrow layers are the GPU's, all else is torch's on the
CPU, so that it needs no torch with CUDA and runs on a simulated GPU too.
"""

from __future__ import annotations

import copy
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import narrowgauge as ng
from narrowgauge import _native, evaluate
from narrowgauge.importers import CausalLM, load_causal_lm, save_folder
from narrowgauge.importers.huggingface import cast_parameters

FORMATS = ("fp8", "fp6", "fp5", "fp4", "int8", "int4")
HEAD_FORMAT = "fp6"  # of the row whose output layer is narrow too
SAVED_FORMAT = "fp6"  # of the model that is saved, loaded again and compared
WINDOWS, WINDOW = 8, 512
PROMPT = "Once upon a time, there was a little girl who"
GENERATED_TOKENS = 40
SLICE_LAYERS, SLICE_TOKENS = 1, 4  # on a GPU: few enough for a simulated one

_WITH_HEAD = f"{HEAD_FORMAT} + head"
_MEANING = {
    "torch fp32": "the reference, four bytes a weight",
    "torch bf16": "torch's usual choice, two bytes a weight",
    "fp8": "8-bit floats with a scale per row",
    "fp6": "6-bit floats with a scale per 128, the default",
    "fp5": "5-bit floats with a scale per 64",
    "fp4": "4-bit floats with a scale per 64",
    "int8": "8-bit integers with a scale per row",
    "int4": "4-bit integers with a scale per 64",
    _WITH_HEAD: f"{HEAD_FORMAT} with the output layer narrow too",
}

_NARROW = (ng.nn.Linear, ng.nn.Embedding)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One model. The bytes are of the same weights in every row, but for the row whose output layer is narrow too."""

    name: str
    format: str
    narrow: bool
    bytes: int
    bytes_bf16: int  # of the same weights in bf16
    perplexity: float
    tokens_per_second: float  # from the median time of a token
    tokens_per_second_p10: float  # from the 10th percentile
    activations: str  # with which it was faster: bf16 or fp32


@dataclass(frozen=True)
class Saved:
    """The narrow model after a round trip through a folder."""

    format: str
    folder: str | None  # None: it was a temporary one
    bytes: int
    seconds_to_load: float
    prompt: str
    text: str
    same_text: bool  # as the model that was saved generates


@dataclass(frozen=True)
class Result:
    """All that was measured, and where."""

    source: str
    text: str
    python: str
    cpu: str
    isa: str
    threads: int
    layers: int
    rows: list[Row]
    saved: Saved
    seconds: float

    def loss(self, row: Row) -> float:
        """Perplexity over that of torch's fp32 row, less one."""
        return row.perplexity / next(each.perplexity for each in self.rows if each.name == "torch fp32") - 1

    def speedup(self, row: Row) -> float:
        """Tokens per second over those of the better torch row."""
        return row.tokens_per_second / max(each.tokens_per_second for each in self.rows if not each.narrow)

    def sentence(self, row: Row) -> str:
        """What the row says, in words."""
        meaning = _MEANING.get(row.name, row.format)
        if not row.narrow:
            return f"{row.name}: {meaning}."
        return (
            f"{row.name}: {meaning}; {row.bytes_bf16 / row.bytes:.2f}x fewer bytes than bf16, "
            f"{100 * self.loss(row):+.1f} % perplexity, {self.speedup(row):.2f}x the better torch row's speed."
        )

    def as_dict(self) -> dict[str, Any]:
        more = [
            {"loss": self.loss(row), "speedup": self.speedup(row), "sentence": self.sentence(row)} for row in self.rows
        ]
        return {**asdict(self), "rows": [{**asdict(row), **each} for row, each in zip(self.rows, more, strict=True)]}


@dataclass(frozen=True)
class Slice:
    """The first layers of a model, with their narrow weights and products on a GPU, beside the same on the CPU."""

    source: str
    device: str
    gpu: str
    format: str
    layers: int
    layers_of_model: int
    matrices: int  # that are narrow
    bytes: int  # of them
    products: int  # that the GPU has made
    prompt: str
    text: str
    same_text: bool  # as the CPU generates
    difference: float  # of logits after the prompt: the largest, over the largest logit
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_text() -> tuple[str, str]:
    """CPython's own documentation of its language, and a name for it; the text differs between versions."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[topic] for topic in sorted(topics))
    return text, f"pydoc_data.topics of Python {platform.python_version()}"


def run(
    model: Path, text: str, text_name: str, *, save: Path | None = None, progress: Progress = lambda step: None
) -> Result:
    """Measures all rows of the model at `model` on the first windows of `text`.

    save: the folder that keeps the narrow model; None: a temporary one. progress is called with the name of each step.
    """
    start = time.perf_counter()
    progress("loading the model")
    lm = load_causal_lm(model, torch.float32)
    windows = evaluate.cut_windows(lm.need_tokenizer(), text, WINDOW, WINDOWS)
    wide, half = lm.model, cast_parameters(copy.deepcopy(lm.model), torch.bfloat16)

    perplexity: dict[str, float] = {}
    reports: dict[str, ng.QuantizeReport] = {}
    contenders: dict[tuple[str, str], Any] = {}  # by row and type of activations
    for kind, base in (("fp32", wide), ("bf16", half)):
        progress(f"torch {kind}: perplexity")
        contenders[f"torch {kind}", kind] = base
        perplexity[f"torch {kind}"] = evaluate.perplexity(base, windows).value
    for name in (*FORMATS, _WITH_HEAD):
        progress(f"{name}: quantizing, perplexity")
        narrow, reports[name] = _narrowed(wide, name)
        perplexity[name] = evaluate.perplexity(narrow, windows).value
        contenders[name, "fp32"] = narrow
        contenders[name, "bf16"] = _with_parameters(narrow, wide, half)

    progress("decoding, all models in turns")
    prompt = torch.tensor(lm.tokenizer(PROMPT)["input_ids"])
    times = evaluate.time_decode(contenders, prompt)
    rows = [_row(name, value, reports, times) for name, value in perplexity.items()]

    progress(f"{SAVED_FORMAT}: saving, loading again, generating")
    saved = _round_trip(lm, contenders[SAVED_FORMAT, "fp32"], prompt, save)
    return Result(
        source=lm.source,
        text=text_name,
        python=platform.python_version(),
        cpu=_native.cpu_name(),
        isa=_native.isa(),
        threads=torch.get_num_threads(),
        layers=len(reports[FORMATS[0]].rows),
        rows=rows,
        saved=saved,
        seconds=time.perf_counter() - start,
    )


def run_on_gpu(model: Path, device: str = "cuda", *, progress: Progress = lambda step: None) -> Slice:
    """Generates with the first layers of the model at `model`, their products made on a GPU, and again on the CPU.

    Both take the activations of these products as fp16. CudaError if there is no GPU; ValueError for a model whose
    layers are not found.
    """
    start = time.perf_counter()
    device = _native.device_name(device)
    gpu = ng.cuda.device(int(device.removeprefix("cuda:"))).name
    progress("loading the model")
    lm = load_causal_lm(model, torch.float32)
    layers_of_model = _keep_layers(lm, SLICE_LAYERS)
    report = ng.quantize_model(lm.model, SAVED_FORMAT)
    progress(f"packing {len(report.rows)} matrices for {device}, {gpu}")
    narrow = {row.layer: _OnGpu(lm.model.get_submodule(row.layer), device) for row in report.rows}
    for name, layer in narrow.items():
        lm.model.set_submodule(name, layer)

    prompt = torch.tensor(lm.need_tokenizer()(PROMPT)["input_ids"])
    logits, tokens = {}, {}
    for place in ("cpu", device):
        progress(f"{len(prompt)} tokens of prompt and {SLICE_TOKENS} more on {place}")
        for layer in narrow.values():
            layer.there = place == device
        with torch.inference_mode():
            logits[place] = lm.model(prompt[None], use_cache=False).logits[0, -1]
        tokens[place] = list(evaluate.generate(lm.model, prompt, SLICE_TOKENS))
    difference = (logits[device] - logits["cpu"]).abs().max() / logits["cpu"].abs().max()
    return Slice(
        source=lm.source,
        device=device,
        gpu=gpu,
        format=str(report.rows[0].format),
        layers=min(SLICE_LAYERS, layers_of_model),
        layers_of_model=layers_of_model,
        matrices=len(report.rows),
        bytes=report.bytes_after,
        products=sum(layer.products for layer in narrow.values()),
        prompt=PROMPT,
        text=lm.tokenizer.decode(tokens[device]),
        same_text=tokens[device] == tokens["cpu"],
        difference=float(difference),
        seconds=time.perf_counter() - start,
    )


class _OnGpu(torch.nn.Module):
    """A narrow layer whose product is made on a GPU while `there` is set, else on the CPU.

    x comes from the host and y returns to it. In between both are fp16, as GPUs take x, on the CPU too.
    """

    def __init__(self, layer: Any, device: str) -> None:
        super().__init__()
        self.layer, self.device, self.there, self.products = layer, device, False, 0
        parts = (part if part is None else part.numpy() for part in layer.weight.canonical())
        q = ng.QTensor.from_canonical(layer.format, layer.weight.shape, ng.Canonical(*parts))
        self.q = q.pack(device)
        self.bias = None if layer.bias is None else ng.Tensor.from_dlpack(layer.bias.detach()).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.half().contiguous()
        if not self.there:
            return self.layer(half).to(x.dtype)  # type: ignore[no-any-return]
        self.products += 1
        y = ng.linear(ng.Tensor.from_dlpack(half).to(self.device), self.q, self.bias)
        return torch.from_dlpack(y.to("cpu")).to(x.dtype)  # type: ignore[attr-defined]


def _keep_layers(lm: CausalLM, count: int) -> int:
    """Drops all layers of the model but the first ones; gives how many there were."""
    layers = getattr(lm.model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(f"{lm.source} is a {type(lm.model).__name__}, whose list of layers is not found")
    lm.model.base_model.layers = layers[:count]
    lm.model.config.num_hidden_layers = min(count, len(layers))
    return len(layers)


def plot(result: Result, path: Path) -> None:
    """Writes a PNG: perplexity against bytes, and against tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    for number, row in enumerate(result.rows):
        offset = (5, 5) if number % 2 == 0 else (5, -12)  # neighbours' names above and below
        marker, color = ("o", "tab:blue") if row.narrow else ("s", "tab:gray")
        for axes, x in ((left, row.bytes / 1e6), (right, row.tokens_per_second)):
            axes.plot(x, row.perplexity, marker=marker, color=color)
            axes.annotate(row.name, (x, row.perplexity), textcoords="offset points", xytext=offset, fontsize=8)
    left.set_xlabel("MB of weights (further left is smaller)")
    right.set_xlabel("tokens/s in decoding (further right is faster)")
    left.set_ylabel("perplexity (lower is better)")
    for axes in (left, right):
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{result.source}\n{result.text}; {result.cpu}, {result.threads} threads, {result.isa}", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _narrowed(base: Any, name: str) -> tuple[Any, ng.QuantizeReport]:
    """A copy of the model with the row's narrow layers; it shares all other tensors with `base`."""
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in chain(base.parameters(), base.buffers())})
    if name == _WITH_HEAD:
        return model, ng.quantize_model(model, {"lm_head": HEAD_FORMAT, "*": HEAD_FORMAT})
    return model, ng.quantize_model(model, name)


def _with_parameters(narrow: Any, wide: Any, half: Any) -> Any:
    """A copy of a model made from `wide` with the parameters of `half`; narrow weights and buffers are shared."""
    shared = chain(narrow.buffers(), (each.weight for each in narrow.modules() if isinstance(each, _NARROW)))
    memo: dict[int, Any] = {id(each): each for each in shared}
    memo.update({id(old): new for old, new in zip(wide.parameters(), half.parameters(), strict=True)})
    return cast_parameters(copy.deepcopy(narrow, memo), torch.bfloat16)


def _row(
    name: str,
    perplexity: float,
    reports: Mapping[str, ng.QuantizeReport],
    times: Mapping[tuple[str, str], evaluate.DecodeTime],
) -> Row:
    narrow = name in reports
    report = reports[name if narrow else FORMATS[0]]
    elements = sum(each.shape[0] * each.shape[1] for each in report.rows)
    kind = min((each for row, each in times if row == name), key=lambda each: times[name, each].median)
    width = {"torch fp32": 4, "torch bf16": 2}.get(name, 0)
    return Row(
        name=name,
        format=str(report.rows[0].format) if narrow else name.removeprefix("torch "),
        narrow=narrow,
        bytes=report.bytes_after if narrow else elements * width,
        bytes_bf16=2 * elements,
        perplexity=perplexity,
        tokens_per_second=1 / times[name, kind].median,
        tokens_per_second_p10=1 / times[name, kind].p10,
        activations=kind,
    )


def _round_trip(lm: CausalLM, model: Any, prompt: torch.Tensor, save: Path | None) -> Saved:
    with tempfile.TemporaryDirectory(prefix="narrowgauge-") as temporary:
        folder = save or Path(temporary)
        save_folder(model, lm.tokenizer, folder)
        start = time.perf_counter()
        again = load_causal_lm(folder)
        seconds = time.perf_counter() - start
        size = sum(file.stat().st_size for file in folder.iterdir())
        expected, tokens = (list(evaluate.generate(each, prompt, GENERATED_TOKENS)) for each in (model, again.model))
        text = again.tokenizer.decode(tokens)
    return Saved(SAVED_FORMAT, str(save) if save else None, size, seconds, PROMPT, text, tokens == expected)
