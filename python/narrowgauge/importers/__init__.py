"""Importers: from a model on disk to a causal language model and its tokenizer.

load_causal_lm() takes a GGUF file, a Hugging Face model folder or a folder written by narrowgauge and returns plain
torch modules; save_folder() writes the last of these. Reading is local and executes nothing from the model: no
pickle, no remote code, no network. Only smollm2.fetch() downloads, and only when it is called.

The modules need the `demo` extra (torch, transformers, gguf). They are imported on first use, so that importing this
package needs none of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowgauge.importers.errors import MissingExtra, ModelUnavailable, require

if TYPE_CHECKING:
    import torch

__all__ = ["CausalLM", "MissingExtra", "ModelUnavailable", "load_causal_lm", "require", "save_folder"]


@dataclass(frozen=True)
class CausalLM:
    """A causal language model in eval mode, on the CPU.

    `model` is a transformers model, `tokenizer` a transformers tokenizer or None where the source has none, and
    `source` says in words what was loaded.
    """

    model: Any
    tokenizer: Any
    source: str

    def need_tokenizer(self) -> Any:
        """The tokenizer; ValueError if the source has none."""
        if self.tokenizer is None:
            raise ValueError(f"{self.source} has no tokenizer: add its tokenizer.json and tokenizer_config.json")
        return self.tokenizer


def load_causal_lm(path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> CausalLM:
    """Loads the model at `path`; the kind is told by what is there.

    dtype: of every tensor that is not narrow; None keeps the checkpoint's own (fp32 for a GGUF).
    Raises FileNotFoundError, MissingExtra, or ValueError for a file or architecture that is not understood.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path}. A MODEL is a GGUF file, a Hugging Face model folder or a folder written "
            "by `narrowgauge quantize`; names on a model hub are not downloaded"
        )
    if path.is_dir():
        from narrowgauge.importers.huggingface import load_folder

        return load_folder(path, dtype)
    from narrowgauge.importers.gguf import load_gguf

    return load_gguf(path, dtype)


def save_folder(model: Any, tokenizer: Any, out: str | os.PathLike[str]) -> None:
    """Writes model.safetensors, config.json and the tokenizer's files into the folder `out`, made if absent.

    Linear layers that quantize_model() made narrow are saved narrow. load_causal_lm(out) reads it back.
    """
    from narrowgauge.importers.huggingface import save_folder as save

    save(model, tokenizer, Path(out))
