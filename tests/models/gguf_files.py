"""Folders of Llama models with a byte-level BPE, written as GGUF files: what llama.cpp's convert_hf_to_gguf.py does."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LLAMA = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}


def write(
    folder: Path,
    into: Path,
    kind: str = "F32",
    *,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
) -> Path:
    """Write the model of `folder` to the file `into`, matrices as `kind`; returns the file.

    `metadata` and `tensors` are what is in it beside, or (None) what is left out of it.
    """
    config = json.loads((folder / "config.json").read_text())
    entries: dict[str, Any] = {f"llama.{name}": config[key] for name, key in _LLAMA.items()}
    entries |= {
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
    }
    entries |= _vocabulary(folder, config) | dict(metadata or {})
    weights: dict[str, Any] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[_named(name)] = _permuted(name, weight, config)
    weights |= dict(tensors or {})
    writer = gguf.GGUFWriter(into, architecture)
    for key, value in entries.items():
        _add(writer, key, value)
    for name, weight in weights.items():
        if weight is None:
            continue
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(weight.astype(np.float32), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return into


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    parts = json.loads((folder / "tokenizer.json").read_text())
    words = {index: word for word, index in parts["model"]["vocab"].items()}
    types = dict.fromkeys(words, gguf.TokenType.NORMAL)
    for token in parts["added_tokens"]:
        words[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [words[index] for index in range(len(words))],
        "tokenizer.ggml.token_type": [int(types[index]) for index in range(len(words))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in parts["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_string(key, value)


def _named(name: str) -> str:
    """transformers' name of a tensor -> GGUF's."""
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{match[1]}.{_NAMES[match[2]]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]


def _permuted(name: str, weight: Any, config: Mapping[str, Any]) -> Any:
    """Llama's queries and keys lie in another order in a GGUF file."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    count = config[heads]
    parts = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)
