"""Rotary positions of a GGUF file, as transformers' `rope_parameters`: all but their base is lost on the way."""

import math
from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np

from common.gguf_file import GGUFFile, Unconvertible

_FREQUENCIES, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# Llama 3.1 and later; what varies between them is the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def is_about(tensor: str) -> bool:
    """Whether a tensor holds no weights but factors of rotary positions, which `complete` has read, or no one reads."""
    return tensor in (_FREQUENCIES, _LONG, _SHORT) or tensor.endswith(("rope_freqs.weight", "attn_rot_embd.weight"))


def complete(config: Any, file: GGUFFile, path: str) -> None:
    """Write into transformers' `config` what the file says of its rotary positions.

    Raises:
        Unconvertible: they are scaled in a way that can't be written there.

    """
    rope = getattr(config, "rope_parameters", None)
    found = _scaling(config, file, path)
    if not rope:
        if found:
            raise Unconvertible(f"{type(config).__name__} has no place for its rotary scaling")
        return
    # Layers that see all of the text are scaled, those that see a window are not.
    target = rope.get("full_attention", rope)
    target |= found
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = file.get("rope.dimension_count")
    if target is rope and turned and turned < head and not hasattr(config, "rotary_dim"):
        rope["partial_rotary_factor"] = turned / head
    config.rope_parameters = rope


def _scaling(config: Any, file: GGUFFile, path: str) -> dict[str, Any]:
    names = {tensor.name for tensor in file.tensors}
    if _FREQUENCIES in names:
        return _llama3(_values(path, _FREQUENCIES), config)
    original = file.get("rope.scaling.original_context_length")
    if _LONG in names and _SHORT in names:
        return {
            "rope_type": "longrope",
            "long_factor": _values(path, _LONG),
            "short_factor": _values(path, _SHORT),
            "original_max_position_embeddings": original or config.max_position_embeddings,
        }
    kind = file.get("rope.scaling.type", "none")
    factor = file.get("rope.scaling.factor", 0.0)
    if kind == "none" or not factor or factor == 1.0:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise Unconvertible(f"its rotary positions are scaled as {kind!r}; linear, yarn, llama3 and longrope can be")


def _llama3(factors: Sequence[float], config: Any) -> dict[str, Any]:
    """The file has a factor for each frequency; they are those of Llama 3 if its formula gives them."""
    parameters = {"rope_type": "llama3", "factor": round(max(factors), 4), **_LLAMA3}
    expected = llama3_factors(parameters, config.rope_parameters["rope_theta"], len(factors))
    if not np.allclose(expected, factors, rtol=1e-3):
        raise Unconvertible("its rotary frequencies are scaled by factors other than those of Llama 3")
    return {} if max(factors) == 1.0 else parameters


def llama3_factors(parameters: dict[str, Any], theta: float, count: int) -> list[float]:
    """What each frequency is divided by: transformers, `_compute_llama3_parameters`."""
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    factors = []
    for index in range(count):
        turns = original / (2 * math.pi * theta ** (index / count))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _values(path: str, name: str) -> list[float]:
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    return [float(each) for each in gguf.dequantize(tensor.data, tensor.tensor_type).ravel()]
