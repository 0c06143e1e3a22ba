"""What becomes of a GGUF file that is given as a model: whether it can be served, in which form, and from which folder.

vLLM reads GGUF by its plugin `vllm-gguf-plugin`, which has kernels for NVIDIA's and AMD's GPUs alone and wants the
configuration and the tokenizer in a folder. Elsewhere all of the file is converted into a Hugging Face folder.
"""

import dataclasses
import hashlib
import importlib.util
import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import transformers
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm import ModelRegistry, envs
from vllm.platforms import current_platform

from common import gguf_file
from common.errors import InvalidRequest, LoadFailed
from common.gguf_file import BrokenGGUF, GGUFFile
from common.wording import in_bytes

PLUGIN = "vllm_gguf_plugin"
FORMS = ("convert", "native")

# Raise it with any change to what ends up in the folder.
_RECIPE = 1
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# For configuration and tokenizer, and what the file system takes.
_SPARE_BYTES = 64 * 1024**2
# What transformers calls an architecture, where GGUF has another word.
_TRANSFORMERS_NAMES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "qwen35": "qwen3_5_text",
    "qwen35moe": "qwen3_5_moe_text",
}
# transformers drops the experts of these files.
_LOSSY = frozenset({"gpt-oss"})


@dataclasses.dataclass(frozen=True)
class GGUFPlan:
    """A file and what is made of it, once."""

    source: str
    folder: str
    """Where config.json and the tokenizer are, and the weights unless `native`; there once it is complete."""
    native: bool
    """Whether the weights stay in the file, for vLLM's plugin."""
    stored_as: str
    """The type of the converted weights: `float16`, ..."""
    size: int
    """Bytes of the converted weights."""

    @property
    def made(self) -> bool:
        """Whether the folder is there, complete."""
        return os.path.isdir(self.folder)

    @property
    def engine_args(self) -> dict[str, Any]:
        """The engine arguments that load it."""
        if not self.native:
            return {"model": self.folder}
        return {"model": self.folder, "model_weights": self.source, "quantization": "gguf", "load_format": "gguf"}


def cache_root() -> Path:
    """The folder of all converted files."""
    return Path(envs.VLLM_CACHE_ROOT) / "gguf"


def plan_gguf(path: str, form: str = "", *, own_tokenizer: bool = False) -> GGUFPlan:
    """What to do with the file at `path`; `form` is one of FORMS or empty, to go by the platform.

    Takes some 10 ms. `own_tokenizer`: that of the file is not used.

    Raises:
        InvalidRequest: the file is broken, or not one that can be served.
        LoadFailed: there is too little disk for what is made of it.

    """
    able = _can_be_native(form)
    try:
        stat = os.stat(path)
        file = gguf_file.read(path)
    except BrokenGGUF as error:
        raise InvalidRequest("Model", f"{path} {error}") from error
    except OSError as error:
        raise InvalidRequest("Model", f"{path}: {error.strerror}") from error
    check_servable(path, file, own_tokenizer=own_tokenizer)
    # Plain floats gain nothing from the plugin, which moreover takes no embedding of them.
    embedded = {tensor.type.name for tensor in file.tensors if tensor.name == "token_embd.weight"}
    native = form == "native" or (able and not embedded & {"F32", "F16", "BF16"})
    identity = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, native, transformers.__version__, _RECIPE)
    key = hashlib.sha256(repr(identity).encode(errors="surrogateescape")).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]+", "-", Path(path).stem, flags=re.ASCII).strip("-.")[:80]
    size = 0 if native else file.elements * _ITEM_BYTES[file.stored_as]
    plan = GGUFPlan(path, str(cache_root() / f"{stem}-{key}"), native, file.stored_as, size)
    if not plan.made:
        _check_disk(plan)
    return plan


def check_servable(path: str, file: GGUFFile, *, own_tokenizer: bool = False) -> None:
    """Raise InvalidRequest where the file holds no model, a part of one, or one that can't be converted."""
    known = architectures()
    if file.architecture in ("clip", "mmproj"):
        raise InvalidRequest("Model", f"{path} is a projector for images or audio; give the file of the language model")
    if file.architecture not in known:
        raise InvalidRequest(
            "Model",
            f"{path} has the architecture {file.architecture!r}; GGUF can be served with {', '.join(sorted(known))}",
        )
    if (parts := file.metadata.get("split.count", 1)) > 1:
        raise InvalidRequest("Model", f"{path} is one of {parts} parts; join them with llama-gguf-split --merge")
    if not file.tensors:
        raise InvalidRequest("Model", f"{path} has no weights, only a vocabulary")
    if file.architecture == "llama" and file.get("expert_count"):
        raise InvalidRequest("Model", f"{path} is a mixture of experts in the form of llama, which can't be converted")
    if types := file.undecodable():
        raise InvalidRequest("Model", f"{path} has weights of type {', '.join(types)}, which can't be decoded")
    words = file.metadata.get("tokenizer.ggml.model")
    if words not in GGUF_TOKENIZER_TYPES and not own_tokenizer:
        raise InvalidRequest(
            "Model",
            f"{path} has {f'a tokenizer of type {words!r}' if words else 'no tokenizer'}, and "
            f"{', '.join(sorted(GGUF_TOKENIZER_TYPES))} can be converted; name another one in Tokenizer",
        )


@cache
def architectures() -> dict[str, str]:
    """The architectures of GGUF that transformers reads and vLLM has a class for, with its name."""
    classes = {}
    words = {name: word for word, name in _TRANSFORMERS_NAMES.items()}
    for name in (*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS):
        word = words.get(name, name)
        found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(_TRANSFORMERS_NAMES.get(word, word))
        known = word in gguf.MODEL_ARCH_NAMES.values() and word not in _LOSSY
        if known and found in ModelRegistry.get_supported_archs():
            classes[word] = found
    return classes


def _can_be_native(form: str) -> bool:
    if form not in ("", *FORMS):
        raise InvalidRequest("Options", f"gguf:{form} is unknown; use gguf:convert or gguf:native")
    able = current_platform.is_cuda_alike() and importlib.util.find_spec(PLUGIN) is not None
    if form == "native" and not able:
        raise InvalidRequest(
            "Options", "gguf:native needs an NVIDIA or AMD GPU and the package vllm-gguf-plugin; use gguf:convert"
        )
    return able and form != "convert"


def _check_disk(plan: GGUFPlan) -> None:
    """Raise LoadFailed where what is made of the file would not fit."""
    place = cache_root()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < plan.size + _SPARE_BYTES:
        raise LoadFailed(
            f"{plan.source} takes {in_bytes(plan.size + _SPARE_BYTES)} when converted, and {cache_root()} has "
            f"{in_bytes(free)} free; VLLM_CACHE_ROOT names another folder"
        )
