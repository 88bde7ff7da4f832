"""Model folders: Hugging Face's (config.json and safetensors) and narrowgauge's own.

A narrowgauge folder is a Hugging Face folder whose single model.safetensors holds narrow tensors (save_model wrote
it) beside the same config.json and tokenizer files. Only safetensors weights are read: never pickle, never code from
the folder, never the network.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import narrowgauge as ng
from narrowgauge.importers import CausalLM
from narrowgauge.importers.errors import require

if TYPE_CHECKING:
    import torch

_WEIGHTS = "model.safetensors"


def load_folder(path: Path, dtype: torch.dtype | None = None) -> CausalLM:
    """Loads either kind of folder; dtype as in load_causal_lm(). ValueError if it holds no model."""
    transformers = require("transformers", "demo")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a model folder: it has no config.json; expected that and *.safetensors")
    narrow = is_narrow(path / _WEIGHTS)
    try:
        if narrow:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            model = ng.load_model(path, empty_model(config, config.dtype))
            model = cast_parameters(model, dtype) if dtype else model
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
    except (OSError, KeyError, require("safetensors", "demo").SafetensorError) as error:
        raise ValueError(f"{path}: the model could not be read: {error}") from error
    kind = "narrowgauge folder" if narrow else "Hugging Face folder"
    return CausalLM(model.eval(), _tokenizer(path), f"{path.name} ({kind})")


def save_folder(model: Any, tokenizer: Any, out: Path) -> None:
    """See narrowgauge.importers.save_folder."""
    out.mkdir(parents=True, exist_ok=True)
    ng.save_model(model, out)
    model.config.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)


def is_narrow(weights: Path) -> bool:
    """Whether a safetensors file holds narrow tensors: narrowgauge says so in its metadata."""
    if not weights.is_file():
        return False
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(size, 100 << 20)))
        except ValueError as error:
            raise ValueError(f"{weights}: damaged safetensors header ({error}); write or fetch it again") from error
    return isinstance(header, dict) and "narrowgauge" in header.get("__metadata__", {})


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A causal language model with tensors allocated but not set: the caller loads every one of them.

    Buffers that no checkpoint holds (rotary frequencies) are set.
    """
    transformers = require("transformers", "demo")
    try:
        skip_init: Any = importlib.import_module("transformers.initialization").no_init_weights
    except (ImportError, AttributeError):  # it saves seconds of random numbers, nothing else
        skip_init = contextlib.nullcontext
    with skip_init():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Gives all parameters, and what narrow embeddings yield, this type, in place, and returns the model.

    Unlike model.to(dtype) it leaves buffers alone: rotary frequencies must stay fp32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, ng.nn.Embedding):
            module.dtype = dtype
    model.config.dtype = dtype
    return model


def _tokenizer(path: Path) -> Any:
    if not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    return require("transformers", "demo").AutoTokenizer.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
