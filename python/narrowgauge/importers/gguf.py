"""GGUF files of the llama architecture, as a transformers LlamaForCausalLM with its tokenizer.

All tensors are dequantized: a GGUF's own block formats are an input here, never kept. The sizes of the model are read
from the metadata. llama.cpp stores the rows of the q and k projections in the order of its rotary embedding (pairs of
neighbours); they are put back into that of transformers (two halves). Other architectures, RoPE scaling and tensors
that are not understood are refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowgauge.importers import CausalLM
from narrowgauge.importers.errors import require

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_MAGIC = b"GGUF"

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How a byte-level BPE tokenizer cuts text before merging, by tokenizer.ggml.pre: a regular expression that isolates
# its matches, or None where byte-level BPE's own (GPT-2's) is enough.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PRE_SPLIT = {"default": None, "gpt-2": None, "smollm": r"\p{N}", "llama-bpe": _LLAMA3_SPLIT}
_CONTROL_TOKEN, _USER_TOKEN = 3, 4


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> CausalLM:
    """Loads a GGUF file of the llama architecture; dtype None means fp32. ValueError if it is not one."""
    torch = require("torch", "demo")
    transformers = require("transformers", "demo")
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = transformers.LlamaConfig(**_config(fields, {tensor.name for tensor in reader.tensors}, path))
    state = _state(reader.tensors, config, dtype or torch.float32, path)

    from narrowgauge.importers.huggingface import empty_model

    model = empty_model(config, dtype or torch.float32)
    loaded = model.load_state_dict(state, strict=False, assign=True)
    absent = [name for name in loaded.missing_keys if not (config.tie_word_embeddings and name == "lm_head.weight")]
    if absent or loaded.unexpected_keys:
        raise ValueError(f"{path}: tensors missing: {absent or 'none'}; unexpected: {loaded.unexpected_keys or 'none'}")
    model.tie_weights()
    name = fields.get("general.name", path.stem)
    return CausalLM(model.eval(), _tokenizer(fields, path), f"{name} (GGUF, {path.name})")


def _open(path: Path) -> Any:
    gguf = require("gguf", "demo")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it starts with {magic!r}, expected {_MAGIC!r}")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: damaged or truncated GGUF file ({error}); fetch it again") from error


def _config(fields: Mapping[str, Any], tensors: set[str], path: Path) -> dict[str, Any]:
    """The arguments of a LlamaConfig."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{path}: architecture {architecture!r} is not supported, only 'llama' is: "
            "use the model's Hugging Face folder (config.json and *.safetensors) instead"
        )

    def get(key: str) -> Any:
        if (name := f"llama.{key}") not in fields:
            raise ValueError(f"{path}: the metadata lacks {name}; the file is incomplete")
        return fields[name]

    if fields.get("llama.expert_count") or "rope_freqs.weight" in tensors or "llama.rope.scaling.type" in fields:
        raise ValueError(
            f"{path}: mixtures of experts and RoPE scaling are not supported from GGUF: "
            "use the model's Hugging Face folder instead"
        )
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: rotary embedding of part of a head is not supported")
    tokens = fields.get("tokenizer.ggml.tokens", ())
    return {
        "vocab_size": fields.get("llama.vocab_size", len(tokens)),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.get("llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _state(tensors: Any, config: Any, dtype: torch.dtype, path: Path) -> dict[str, torch.Tensor]:
    gguf = require("gguf", "demo")
    torch = require("torch", "demo")
    state = {}
    for tensor in tensors:
        name, part = _torch_name(tensor.name, path)
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{path}: {tensor.name}: type {tensor.tensor_type.name} is not supported") from error
        if part == "attn_q":
            weight = unpermute(weight, config.num_attention_heads)
        elif part == "attn_k":
            weight = unpermute(weight, config.num_key_value_heads)
        # A copy: the reader's arrays are views of a read-only mapping.
        state[name] = torch.tensor(weight, dtype=dtype)
    return state


def _torch_name(name: str, path: Path) -> tuple[str, str]:
    """blk.3.attn_q.weight -> (model.layers.3.self_attn.q_proj.weight, attn_q)"""
    if name in _TOP:
        return _TOP[name], name
    block = name.split(".")
    if len(block) == 4 and block[0] == "blk" and block[2] in _BLOCK and block[3] == "weight":
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.weight", block[2]
    raise ValueError(f"{path}: tensor {name!r} is not part of a plain llama model")


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """[heads * D, K]: from llama.cpp's order of rows within a head, 0, D/2, 1, D/2 + 1, ..., to 0, 1, 2, ..."""
    rows, cols = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, cols)
    restored: NDArray[np.float32] = pairs.swapaxes(1, 2).reshape(rows, cols)
    return restored


def _tokenizer(fields: Mapping[str, Any], path: Path) -> Any:
    """A transformers tokenizer; None if the file holds none."""
    if "tokenizer.ggml.tokens" not in fields:
        return None
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_SPLIT:
        # Slower (it reads the whole file again), but it knows SentencePiece and more.
        return require("transformers", "demo").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    tk = require("tokenizers", "demo")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types = fields.get("tokenizer.ggml.token_type", ())
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    core = tk.Tokenizer(tk.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")
    if split := _PRE_SPLIT[pre]:
        isolate = tk.pre_tokenizers.Split(tk.Regex(split), "isolated")
        core.pre_tokenizer = tk.pre_tokenizers.Sequence([isolate, byte_level])
    else:
        core.pre_tokenizer = byte_level
    core.decoder = tk.decoders.ByteLevel()
    core.add_special_tokens([tokens[i] for i, kind in enumerate(types) if kind == _CONTROL_TOKEN])
    core.add_tokens([tokens[i] for i, kind in enumerate(types) if kind == _USER_TOKEN])

    special = {
        f"{role}_token": tokens[fields[key]]
        for role, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("unk", "tokenizer.ggml.unknown_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in fields
    }
    transformers = require("transformers", "demo")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer
