"""What the weights of a model weigh once they are loaded, read from the headers of its safetensors files."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import get_local_safetensors_metadata, get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

from common.errors import InvalidRequest
from common.model_shape import DTYPES, ModelShape
from common.wording import first_problem

_FLOATS = ("F64", "F32", "F16", "BF16")
_EXPERT = re.compile(r"\.experts\.")
_LAYER = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")
_OTHER_FILES = ("*.safetensors", "*.bin", "*.pt")
_INDEX = "model.safetensors.index.json"
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError)
_UNREADABLE = (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError, *_MALFORMED)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One entry of a file's header."""

    name: str
    dtype: str
    elements: int
    stored: int
    """Bytes in the file."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes on the GPUs, by how they are split."""

    layers: int
    """Divided by tensor and pipeline parallel size."""
    experts: int = 0
    """Routed experts: divided by the data parallel size too."""
    rest: int = 0
    """Embeddings, the output, encoders: divided by the tensor parallel size."""
    guessed: bool = False
    """Only the size of the files is known: experts are counted as layers."""

    @property
    def total(self) -> int:
        """All of one copy of the model."""
        return self.layers + self.experts + self.rest


def read_weights(model: str, shape: ModelShape, dtype: str = "") -> Weights:
    """The weights of a folder, or of a model on the hub, as they are in a GPU's memory.

    `dtype` is what they are loaded as; "" is vLLM's choice: the model's own, or 16 bits where that is float32.

    Raises:
        InvalidRequest: there are none, or they can't be read.

    """
    folder = Path(model)
    try:
        if not folder.is_dir():
            files = get_safetensors_metadata(model).files_metadata
        elif (size := _whole_size(folder)) is not None:
            return Weights(layers=size, guessed=True)
        else:
            files = get_local_safetensors_metadata(folder).files_metadata
    except _UNREADABLE as error:
        raise InvalidRequest("MODEL", f"{model}: its weights can't be read: {first_problem(error)}") from error
    tensors = [
        Tensor(name, each.dtype, each.parameter_count, each.data_offsets[1] - each.data_offsets[0])
        for file in files.values()
        for name, each in file.tensors.items()
    ]
    if not tensors:
        raise InvalidRequest("MODEL", f"{model}: its weights are empty")
    return weights_of(tensors, shape, dtype)


def weights_of(tensors: Iterable[Tensor], shape: ModelShape, dtype: str = "") -> Weights:
    """What these tensors take; as they are stored where the model is quantized, else in its dtype."""
    chosen = dtype or (shape.dtype if DTYPES[shape.dtype] == 2 else "bfloat16")
    layers = experts = rest = 0
    for tensor in tensors:
        found = _LAYER.match(tensor.name)
        if found and int(found[1]) >= shape.layers:
            continue  # layers that draft tokens, which are loaded only when asked for
        size = tensor.stored
        if not shape.quantization and tensor.dtype in _FLOATS:
            size = tensor.elements * DTYPES[chosen]
        if shape.experts and _EXPERT.search(tensor.name):
            experts += size
        elif found:
            layers += size
        else:
            rest += size
    return Weights(layers, experts, rest)


def _whole_size(folder: Path) -> int | None:
    """The size that an index without its files gives, or of files of another kind; None where headers say more."""
    with contextlib.suppress(FileNotFoundError):
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        if all((folder / name).is_file() for name in set(index["weight_map"].values())):
            return None
        return int(index["metadata"]["total_size"])  # of a download that has not begun
    if (folder / "model.safetensors").is_file():
        return None
    sizes = (sum(file.stat().st_size for file in folder.glob(pattern)) for pattern in _OTHER_FILES)
    found = next((size for size in sizes if size), 0)
    if not found:
        raise FileNotFoundError(f"the folder has none, nor {_INDEX}")
    return found
