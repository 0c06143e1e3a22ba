"""Toys of other architectures than Llama, through a GGUF file and back: the folder has every weight that went in."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from common import gguf_plan
from tests.unit.test_gguf_conversion import convert

WORDS = 64
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# The architecture in the file, transformers' name, and what of the shape the file can't say or says otherwise.
TOYS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen3", {"head_dim": 128}),
    ("phi3", "phi3", {}),
    ("gemma2", "gemma2", {"head_dim": 32, "tie_word_embeddings": True}),
    ("gemma3", "gemma3_text", {"head_dim": 32, "tie_word_embeddings": True}),
    (
        "qwen3moe",
        "qwen3_moe",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768},
    ),
    ("starcoder2", "starcoder2", {"tie_word_embeddings": True}),
]


def write(path: Path, architecture: str, config: Any, weights: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if head := getattr(config, "head_dim", None):
        writer.add_key_length(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-6)
    if experts := getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("!") + index) for index in range(WORDS - 1)), '!"'])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * WORDS)
    writer.add_token_merges(['! "'])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, weight in weights.items():
        writer.add_tensor(name, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_gguf(architecture: str, model: Any) -> dict[str, Any]:
    """Its weights as convert_hf_to_gguf.py of llama.cpp writes them."""
    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        data = weight.numpy()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            data = data + 1
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            found[f"blk.{block}.ffn_gate_exps.weight"], found[f"blk.{block}.ffn_up_exps.weight"] = np.split(data, 2, 1)
            continue
        stem, dot, kind_of = name.rpartition(".")
        if kind_of not in ("weight", "bias"):
            stem, dot, kind_of = name, ".", "weight"
        found[f"{names.get_name(stem)}{dot}{kind_of}"] = data
    return found


@pytest.mark.parametrize(("architecture", "name", "shape"), TOYS, ids=[toy[0] for toy in TOYS])
def test_every_weight_comes_back(architecture: str, name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    assert architecture in gguf_plan.architectures()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE | shape)).float()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)
    model.save_pretrained(tmp_path / "original")
    write(tmp_path / "model.gguf", architecture, model.config, as_gguf(architecture, model))
    said = convert(tmp_path / "model.gguf", tmp_path / "made", "float32")
    assert said[-1] == ("stage", "writing the weights"), said
    original, made = load_file(tmp_path / "original/model.safetensors"), load_file(tmp_path / "made/model.safetensors")
    assert made.keys() == original.keys()
    for key, weight in original.items():
        torch.testing.assert_close(made[key], weight, rtol=1e-6, atol=1e-6, msg=key)
