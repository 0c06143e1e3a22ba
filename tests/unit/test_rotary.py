"""Rotary positions of a GGUF file, as transformers has them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common import gguf_file, rotary
from common.gguf_file import Unconvertible

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def completed(config: Any, path: Path, tensors: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    """The rope_parameters of `config` after a look at a file with these tensors and metadata."""
    writer = gguf.GGUFWriter(path / "model.gguf", "llama")
    for name, value in metadata.items():
        key = "llama.rope." + name.replace("__", ".")
        {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)](key, value)
    for name, tensor in (tensors or {"output_norm.weight": np.ones(32)}).items():
        writer.add_tensor(name, np.asarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = str(path / "model.gguf")
    rotary.complete(config, gguf_file.read(source), source)
    found: dict[str, Any] = config.rope_parameters
    return found


def llama() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        head_dim=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {"rope_type": "default"}),
        ({"scaling__type": "none", "scaling__factor": 4.0}, {"rope_type": "default"}),
        ({"scaling__type": "linear", "scaling__factor": 1.0}, {"rope_type": "default"}),
        ({"scaling__type": "linear", "scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"scaling__type": "yarn", "scaling__factor": 4.0, "scaling__original_context_length": 32768},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        ({"dimension_count": 128}, {"rope_type": "default"}),
        ({"dimension_count": 32}, {"rope_type": "default", "partial_rotary_factor": 0.25}),
    ],
)
def test_metadata(metadata: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert completed(llama(), tmp_path, {}, **metadata) == {"rope_theta": 5e5} | expected


def test_llama3_is_recognized_by_its_factors(tmp_path: Path) -> None:
    scaled = llama()
    scaled.rope_parameters |= LLAMA3
    # What transformers divides the frequencies by.
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]
    plain = 1.0 / (5e5 ** (torch.arange(0, 128, 2).float() / 128))
    found = completed(llama(), tmp_path, {"rope_freqs.weight": (plain / frequencies).numpy()})
    assert found == {"rope_theta": 5e5} | LLAMA3


def test_factors_of_one_scale_nothing(tmp_path: Path) -> None:
    found = completed(llama(), tmp_path, {"rope_freqs.weight": np.ones(64)})
    assert found == {"rope_theta": 5e5, "rope_type": "default"}


def test_long_rope(tmp_path: Path) -> None:
    config = Phi3Config(max_position_embeddings=131072, hidden_size=256, num_attention_heads=4)
    factors = {"rope_factors_long.weight": np.full(32, 3.0), "rope_factors_short.weight": np.full(32, 1.5)}
    found = completed(config, tmp_path, factors, scaling__original_context_length=4096)
    assert found["rope_type"] == "longrope"
    assert (found["long_factor"], found["short_factor"]) == ([3.0] * 32, [1.5] * 32)
    assert found["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize(
    ("tensors", "metadata", "reason"),
    [
        ({"rope_freqs.weight": np.linspace(1, 9, 64)}, {}, "other than those of Llama 3"),
        ({}, {"scaling__type": "spiral", "scaling__factor": 2.0}, "scaled as 'spiral'"),
        ({}, {"scaling__type": "yarn", "scaling__factor": 2.0}, "scaled as 'yarn'"),
    ],
)
def test_what_can_not_be_written(
    tensors: dict[str, Any], metadata: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Unconvertible, match=reason):
        completed(llama(), tmp_path, tensors, **metadata)
