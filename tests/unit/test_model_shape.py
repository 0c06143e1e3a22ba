"""What a `config.json` says of a model's split, compared with what vLLM makes of the same file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from vllm.config.model import MODEL_ARCH_CONFIG_CONVERTORS, ModelArchConfigConvertorBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

from common.errors import InvalidRequest
from common.model_shape import ModelShape, kv_bytes, read_config, shape_of
from tests.models import ensure

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
}
# Otherwise what transformers has for the type: files leave out what is the default.
FILES: list[dict[str, Any]] = [
    LLAMA_70B,
    DEEPSEEK_V3,
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "mixtral"},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
    {"model_type": "qwen3_moe"},
    {"model_type": "qwen3_next"},
    {"model_type": "gemma2"},
    {"model_type": "gemma3_text"},
    {"model_type": "gpt_oss"},
    {"model_type": "gpt2"},
    {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8},
    {"model_type": "falcon", "multi_query": True},
    {"model_type": "phi3"},
    {"model_type": "olmoe"},
    {"model_type": "glm4_moe"},
    {"model_type": "deepseek_v2"},
    {"model_type": "deepseek_v32"},
    {"model_type": "llama4"},
    {"model_type": "granitemoehybrid", "num_hidden_layers": 4, "layer_types": ["mamba", "attention"] * 2},
    {"model_type": "qwen2_vl"},
]


def vllms(raw: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    kind = MODEL_ARCH_CONFIG_CONVERTORS.get(raw["model_type"], ModelArchConfigConvertorBase)
    return kind(config, config.get_text_config())


@pytest.mark.parametrize("raw", FILES, ids=lambda raw: str(raw["model_type"]))
def test_the_shape_is_that_of_vllm(raw: dict[str, Any]) -> None:
    shape, theirs = shape_of(raw), vllms(raw)
    assert shape.layers == theirs.get_num_hidden_layers()
    assert shape.heads == theirs.get_total_num_attention_heads()
    assert shape.experts == theirs.get_num_experts()
    assert shape.latent == theirs.is_deepseek_mla()
    assert shape.context == theirs.derive_max_model_len_and_key()[0]
    if shape.latent:
        assert (shape.kv_heads, shape.cached) == (1, theirs.get_head_size())
    else:
        assert shape.kv_heads == theirs.get_total_num_kv_heads()
        assert shape.cached == 2 * theirs.get_head_size()


@pytest.mark.parametrize("tensor", [1, 2, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("raw", [LLAMA_70B, DEEPSEEK_V3], ids=["llama", "deepseek_v3"])
def test_a_token_takes_as_much_of_the_cache_as_in_vllm(raw: dict[str, Any], dtype: torch.dtype, tensor: int) -> None:
    shape, theirs = shape_of(raw), vllms(raw)
    # As ModelConfig.get_num_kv_heads has it.
    heads = 1 if shape.latent else max(1, theirs.get_total_num_kv_heads() // tensor)
    kind = MLAAttentionSpec if shape.latent else FullAttentionSpec
    page = kind(block_size=16, num_kv_heads=heads, head_size=theirs.get_head_size(), dtype=dtype)
    assert kv_bytes(shape, 16, tensor=tensor, element=dtype.itemsize) == page.page_size_bytes * shape.layers


def test_a_request_of_llama_70b_and_of_deepseek_v3() -> None:
    assert kv_bytes(shape_of(LLAMA_70B), 1) == 2 * 80 * 8 * 128 * 2 == 327680
    assert kv_bytes(shape_of(LLAMA_70B), 1000, tensor=4, pipeline=3) == 1000 * 27 * 2 * 2 * 128 * 2
    assert kv_bytes(shape_of(DEEPSEEK_V3), 1, tensor=8) == 61 * (512 + 64) * 2 == 70272


def test_layers_with_a_window_cache_no_more_than_that() -> None:
    shape = shape_of({"model_type": "gpt_oss"})
    assert (shape.whole_layers, shape.window_layers, shape.window) == (18, 18, 128)
    token = 8 * 2 * 64 * 2
    assert kv_bytes(shape, 100) == 36 * 100 * token
    assert kv_bytes(shape, 1000) == 18 * (1000 + 128) * token


def test_layers_without_a_cache() -> None:
    shape = shape_of({"model_type": "qwen3_next"})
    assert (shape.layers, shape.whole_layers, shape.window_layers) == (48, 12, 0)


def test_sparse_attention_has_an_index_beside_its_cache() -> None:
    shape = shape_of({"model_type": "deepseek_v32"})
    assert kv_bytes(shape, 1) == shape.layers * (576 * 2 + 132)


@pytest.mark.parametrize(
    ("raw", "widths", "expert_width"),
    [
        (LLAMA_70B, (28672, 8192), 0),
        (DEEPSEEK_V3, (18432,), 2048),
        ({"model_type": "mixtral"}, (4096,), 14336),
    ],
    ids=["dense", "latent", "experts only"],
)
def test_what_is_cut(raw: dict[str, Any], widths: tuple[int, ...], expert_width: int) -> None:
    shape = shape_of(raw)
    assert (shape.widths, shape.expert_width) == (widths, expert_width)


@pytest.mark.parametrize(
    ("found", "name", "block"),
    [
        (None, "", 1),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "awq", 64),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, "gptq", 1),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"group_size": 32}}}},
            "compressed-tensors",
            32,
        ),
        (
            {"quant_method": "compressed_tensors", "config_groups": {"0": {"weights": {"block_structure": [128, 64]}}}},
            "compressed-tensors",
            128,
        ),
        ({"quant_method": "mxfp4"}, "mxfp4", 1),
    ],
)
def test_quantization(found: dict[str, Any] | None, name: str, block: int) -> None:
    raw = LLAMA_70B | ({"quantization_config": found} if found else {})
    assert (shape_of(raw).quantization, shape_of(raw).block) == (name, block)


def test_a_type_that_transformers_does_not_know() -> None:
    shape = shape_of(DEEPSEEK_V3 | {"model_type": "kimi_k9"})
    assert shape == shape_of(DEEPSEEK_V3)


def test_a_part_of_a_model_that_sees() -> None:
    shape = shape_of({"model_type": "sees_all", "architectures": ["SeesAll"], "text_config": LLAMA_70B})
    assert (shape.architecture, shape.heads, shape.kv_heads, shape.dtype) == ("SeesAll", 64, 8, "bfloat16")


def test_a_folder() -> None:
    shape = shape_of(read_config(str(ensure("scripted"))))
    assert isinstance(shape, ModelShape)
    assert shape.architecture == "LlamaForCausalLM"
    assert shape.context == 4096


def test_what_cannot_be_read(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(InvalidRequest) as caught:
            shape_of(read_config(str(tmp_path)))
        return str(caught.value)

    assert "no config.json that can be read" in refusal()
    for text, problem in (
        ("{", "no config.json that can be read"),
        ("[]", "holds no object"),
        ("{}", "num_hidden_layers and num_attention_heads must be 1 or more"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": "many"}), "config.json: "),
    ):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        assert problem in refusal()
    with pytest.raises(InvalidRequest, match="neither a folder nor a hub id"):
        read_config("/no/such/folder")
