"""What a GGUF file says of itself: its metadata and the table of its tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf` makes an object
of each word of the vocabulary, which takes seconds; this one steps over them.
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # unless the metadata says else
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TORCH_TYPES = frozenset({"F32", "F16", "BF16"})


class BrokenGGUF(ValueError):
    """The file can't be read; the text says what is wrong with it."""


class Unconvertible(ValueError):
    """The file can be read, and not be converted; the text says why."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An entry of the table."""

    name: str
    elements: int
    type: gguf.GGMLQuantizationType


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The head of a file."""

    metadata: Mapping[str, Any]
    """By their full names. Of an array only its length."""
    tensors: tuple[Tensor, ...]
    words: tuple[str, ...] = ()
    """The vocabulary by ids, where it was asked for."""

    @property
    def architecture(self) -> str:
        """Such as `llama`; the prefix of the metadata that describe the model."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata entry `key` of the architecture: `rope.freq_base` is `llama.rope.freq_base` in the file."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @property
    def elements(self) -> int:
        """Weights in all."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def types(self) -> frozenset[str]:
        """How weights are stored: `F32`, `Q4_K`, ..."""
        return frozenset(tensor.type.name for tensor in self.tensors)

    @property
    def stored_as(self) -> str:
        """The type of PyTorch that holds every weight: float32 and bfloat16 where the file has nothing coarser.

        The scales of blocks are 16-bit floats with 11 significant bits, of which bfloat16 would keep 8.
        """
        if self.types <= {"F32"}:
            return "float32"
        return "bfloat16" if self.types <= {"F32", "BF16"} else "float16"

    def undecodable(self) -> list[str]:
        """The types among its tensors that `gguf` can't turn into numbers."""
        return sorted(name for name in self.types - _TORCH_TYPES if not _decodes(gguf.GGMLQuantizationType[name]))


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins as a GGUF file does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read(path: str, *, with_words: bool = False) -> GGUFFile:
    """The head of the file, after a look at whether all that it lists is there.

    Raises:
        BrokenGGUF: it is none, cut short, or of a version or with types that are not known here.
        OSError: it can't be opened.

    """
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise BrokenGGUF("does not begin as a GGUF file does")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).read(with_words=with_words)
            except (struct.error, IndexError, OverflowError, MemoryError):
                raise BrokenGGUF("is cut short: its head goes on beyond its end") from None
            except UnicodeDecodeError:
                raise BrokenGGUF("has a name in its head that is no UTF-8") from None


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(MAGIC)

    def read(self, *, with_words: bool) -> GGUFFile:
        version = self._number("<I")
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise BrokenGGUF(
                "is written for big-endian machines" if big_endian else f"has the unknown version {version}"
            )
        tensors, entries = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        words: list[str] = []
        for _ in range(entries):
            key = self._string()
            kept = words if with_words and key == gguf.Keys.Tokenizer.LIST else None
            metadata[key] = self._value(self._number("<I"), kept)
        table = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise BrokenGGUF(f"has the alignment {alignment}")
        start = math.ceil(self._at / alignment) * alignment
        missing = max((start + end for _, end in table), default=0) - len(self._data)
        if missing > 0:
            raise BrokenGGUF(f"is cut short: the last {missing} bytes of its weights are missing")
        return GGUFFile(metadata, tuple(tensor for tensor, _ in table), tuple(words))

    def _tensor(self) -> tuple[Tensor, int]:
        """The entry, and where its weights end, from their start."""
        name, dimensions = self._string(), self._number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise BrokenGGUF(f"has {dimensions} dimensions for {name}")
        elements = math.prod(self._number("<Q") for _ in range(dimensions))
        type_id, offset = self._number("<I"), self._number("<Q")
        try:
            kind = gguf.GGMLQuantizationType(type_id)
        except ValueError:
            raise BrokenGGUF(f"stores {name} as type {type_id}, which is not known here") from None
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return Tensor(name, elements, kind), offset + elements // block_elements * block_bytes

    def _value(self, type_id: int, kept: list[str] | None) -> Any:
        """The value, or the length of an array, whose strings go to `kept`."""
        if type_id in _FORMATS:
            return self._number(_FORMATS[type_id])
        if type_id == _STRING:
            return self._string()
        if type_id != _ARRAY:
            raise BrokenGGUF(f"has metadata of type {type_id}, which is not known here")
        kind, count = self._number("<I"), self._number("<Q")
        if kind in _FORMATS:
            self._skip(count * struct.calcsize(_FORMATS[kind]))
        elif kind == _STRING and kept is not None:
            kept.extend(self._string() for _ in range(count))
        elif kind == _STRING:
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:
            raise BrokenGGUF(f"has metadata that are an array of type {kind}, which is not known here")
        return count

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._number("<Q")
        self._skip(length)
        return self._data[self._at - length : self._at].decode()

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > len(self._data):
            raise IndexError


def _decodes(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether a block of it can be decoded: there is no list of what can."""
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
