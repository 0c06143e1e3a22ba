"""What decides how a model can be split over GPUs: layers, heads, experts, and the bytes of its KV cache.

All of it is read from `config.json`, with the defaults that transformers has for the model's type. No vLLM, no weights.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from common.errors import InvalidRequest
from common.wording import first_problem

# Bytes of an element of the weights or of the KV cache.
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float": 4}
KV_DTYPES = {**DTYPES, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
# They compress keys and values for the weights' sake; vLLM caches them uncompressed.
_NO_LATENT_CACHE = ("minicpm3", "plm")
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")
# Layers of these kinds have a state of fixed size, or none.
_NO_CACHE = ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "short_conv", "mlp", "moe")
_WINDOW = "sliding_attention"


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model as far as its split is concerned; sizes are those of one whole model."""

    architecture: str
    layers: int
    whole_layers: int
    """Layers that cache every token."""
    window_layers: int
    """Layers that cache the last `window` tokens."""
    window: int
    heads: int
    kv_heads: int
    """1 where the cache is a latent one: each GPU then has all of it."""
    cached: int
    """Elements that a layer caches for a token and a KV head: key and value, or the latent vector."""
    cached_bytes: int
    """Bytes that a layer caches for a token beside those, whatever the cache's type."""
    latent: bool
    """Multi-head latent attention."""
    experts: int
    """Routed experts of a layer; 0: dense."""
    widths: tuple[int, ...]
    """Widths of matrices that tensor parallelism cuts."""
    expert_width: int
    """Width of an expert, which is cut where experts are not handed out whole."""
    block: int
    """Elements that share a scale where the weights are quantized: no cut may go through them. 1: none."""
    context: int
    """Tokens that the model is made for."""
    dtype: str
    """That of the weights in the model's files, before quantization."""
    quantization: str
    """As vLLM calls it; "" for none."""


def read_config(model: str) -> dict[str, Any]:
    """`config.json` of a folder, or of a model on the hub.

    Raises:
        InvalidRequest: there is none that can be read.

    """
    path = Path(model, "config.json")
    try:
        if not Path(model).is_dir():
            path = Path(hf_hub_download(model, "config.json"))
        config = json.loads(path.read_text(encoding="utf-8"))
    except HFValidationError:
        raise InvalidRequest("MODEL", f"{model!r} is neither a folder nor a hub id such as Qwen/Qwen3-0.6B") from None
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise InvalidRequest("MODEL", f"{model}: no config.json that can be read: {first_problem(error)}") from error
    if not isinstance(config, dict):
        raise InvalidRequest("MODEL", f"{model}: config.json holds no object")
    return config


def shape_of(raw: Mapping[str, Any]) -> ModelShape:
    """The shape that a `config.json` describes.

    Names and defaults follow vLLM's `transformers_utils/model_arch_config_convertor.py`.

    Raises:
        InvalidRequest: it describes no model with attention heads and layers.

    """
    kind = CONFIG_MAPPING[raw["model_type"]] if raw.get("model_type") in CONFIG_MAPPING else PreTrainedConfig
    try:
        config = kind.from_dict(dict(raw))
        text = config.get_text_config()
    except Exception as error:  # its classes check what they like, each with an exception of its own
        raise InvalidRequest("MODEL", f"config.json: {first_problem(error)}") from error
    if isinstance(text, dict):
        text = PreTrainedConfig.from_dict(text)
    inner = raw.get("text_config")
    own: Mapping[str, Any] = inner if isinstance(inner, dict) else raw
    layers, heads = _int(text, "num_hidden_layers"), _int(text, "num_attention_heads")
    if layers < 1 or heads < 1:
        raise InvalidRequest("MODEL", "config.json: num_hidden_layers and num_attention_heads must be 1 or more")
    rank = _int(text, "kv_lora_rank")
    latent = rank > 0 and getattr(text, "model_type", "") not in _NO_LATENT_CACHE
    head_size = _int(text, "head_dim", "hidden_size_per_head") or _int(text, "hidden_size") // heads
    experts = _int(text, *_EXPERTS)
    whole, few = _layer_kinds(text, layers)
    width = _int(text, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * _int(text, "hidden_size")
    expert_width = _int(text, "moe_intermediate_size", "expert_ffn_hidden_size") or (width if experts else 0)
    dense = () if experts and expert_width == width else (width,)
    quantization, block = _quantization(raw, config)
    return ModelShape(
        architecture=(raw.get("architectures") or ["unknown"])[0],
        layers=layers,
        whole_layers=whole,
        window_layers=few,
        window=_int(text, "sliding_window"),
        heads=heads,
        kv_heads=1 if latent else _kv_heads(text, heads),
        # transformers maps head_dim onto qk_rope_head_dim for some types: the file has the truth.
        cached=rank + (own.get("qk_rope_head_dim") or _int(text, "qk_rope_head_dim")) if latent else 2 * head_size,
        # Sparse attention looks its keys up by an index of eight bits, and a scale for each.
        cached_bytes=(_int(text, "index_head_dim") + 4) if _int(text, "index_head_dim") else 0,
        latent=latent,
        experts=experts,
        widths=dense if latent else (*dense, heads * head_size),
        expert_width=expert_width,
        block=block,
        context=min((found for name in _CONTEXT if (found := _int(text, name))), default=0),
        dtype=_dtype(config, text),
        quantization=quantization,
    )


def kv_bytes(shape: ModelShape, tokens: int, *, tensor: int = 1, pipeline: int = 1, element: int = 2) -> int:
    """Bytes that one request of so many tokens takes in the KV cache of one GPU, of `element` bytes a number.

    vLLM's page sizes (`v1/kv_cache_interface.py`): KV heads are divided by the tensor parallel size and repeated where
    there are fewer; a latent cache is on every GPU. The layers are those of the fullest pipeline stage.
    """
    heads = max(1, shape.kv_heads // tensor)
    token = heads * shape.cached * element + shape.cached_bytes
    whole = math.ceil(shape.whole_layers / pipeline) * tokens
    few = math.ceil(shape.window_layers / pipeline) * min(tokens, shape.window)
    return (whole + few) * token


def _int(config: Any, *names: str) -> int:
    """The first of these that the config has, 0 for none; the largest where each layer has its own."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
            value = max(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return int(value)
    return 0


def _kv_heads(text: Any, heads: int) -> int:
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    return _int(text, *_KV_HEADS) or heads


def _layer_kinds(text: Any, layers: int) -> tuple[int, int]:
    """How many layers cache every token, and how many only a window."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if isinstance(kinds, list | tuple) and len(kinds) == layers:
        few = sum(kind == _WINDOW for kind in kinds) if _int(text, "sliding_window") else 0
        return layers - few - sum(kind in _NO_CACHE for kind in kinds), few
    if _int(text, "sliding_window") and getattr(text, "use_sliding_window", True):
        return 0, layers
    return layers, 0


def _quantization(raw: Mapping[str, Any], config: Any) -> tuple[str, int]:
    """The name of the method and the elements that share a scale."""
    text = raw.get("text_config")
    found = raw.get("quantization_config") or raw.get("compression_config")
    if not found and isinstance(text, dict):
        found = text.get("quantization_config")
    found = found or getattr(config, "quantization_config", None)
    if not isinstance(found, dict):
        return "", 1
    groups = [each.get("weights") or {} for each in (found.get("config_groups") or {}).values()]
    shared = [found.get("group_size"), *(each.get("group_size") for each in groups)]
    shared += [size for sizes in (found.get("weight_block_size"), *(each.get("block_structure") for each in groups))
               if isinstance(sizes, list) for size in sizes]  # fmt: skip
    block = max((size for size in shared if isinstance(size, int) and size > 0), default=1)
    return str(found.get("quant_method") or "unknown").replace("_", "-"), block


def _dtype(config: Any, text: Any) -> str:
    name = str(getattr(config, "dtype", None) or getattr(text, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in DTYPES else "float32"
