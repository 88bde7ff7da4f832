"""A tiny random Llama with a byte-level tokenizer, as a transformers model, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|end|>", "<|turn|>"]
TOKENS = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}<|turn|>"
TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, the sea 1851. " * 40


def model(*, tied: bool = True, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,  # else random logits are all but equal
    )
    return LlamaForCausalLM(config).eval()


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp has them: i and i + D/2 become neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(path: Path, model: Any, *, kind: str = "F32", tokenizer: bool = True, **changes: Any) -> Path:
    """kind: type of the 2-D tensors. changes: metadata to set (`.` written as `__`), None to leave it out."""
    config = model.config
    values: dict[str, Any] = {
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    architecture = changes.pop("general__architecture", "llama")
    extra = changes.pop("extra_tensor", None)
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
        writer.add_token_merges(MERGES)
        writer.add_chat_template(TEMPLATE)
    names = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        parts = name.split(".")
        if parts[1] == "layers":
            if parts[-2] in ("q_proj", "k_proj"):
                heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
                weight = _permute(weight, heads)
            name = f"blk.{parts[2]}.{names[parts[-2]]}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[parts[-2]] + ".weight"
        _add(writer, name, weight, kind)
    if extra is not None:
        _add(writer, extra, np.ones(4, np.float32), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, weight: np.ndarray, kind: str) -> None:
    if kind == "F32" or weight.ndim < 2:
        writer.add_tensor(name, np.ascontiguousarray(weight))
        return
    quantized = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weight), quantized), raw_dtype=quantized)
