"""The head of GGUF files: as the package `gguf` reads it, and what is broken about those that are."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from common import gguf_file
from common.gguf_file import BrokenGGUF

WORDS = ["<s>", "Ġthe", "é", ""]


def written(path: Path, *, version: int = 3) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_array("tokenizer.ggml.tokens", WORDS)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    for name, kind in (("token_embd.weight", "Q8_0"), ("output_norm.weight", "F32"), ("blk.0.attn_q.weight", "Q4_0")):
        stored = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(np.ones((4, 64), np.float32), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_as_gguf_reads_it(file: Path) -> None:
    found, known = gguf_file.read(str(file), with_words=True), gguf.GGUFReader(file)
    for key, value in found.metadata.items():
        contents = known.fields[key].contents()
        assert value == (len(contents) if isinstance(contents, list) else contents)
    assert found.metadata.keys() == {key for key in known.fields if not key.startswith("GGUF.")}
    assert [(tensor.name, tensor.elements, tensor.type) for tensor in found.tensors] == [
        (tensor.name, tensor.n_elements, tensor.tensor_type) for tensor in known.tensors
    ]
    assert found.words == tuple(WORDS)
    assert gguf_file.read(str(file)).words == ()
    assert (found.architecture, found.get("block_count"), found.get("nothing", 7)) == ("llama", 2, 7)
    assert (found.elements, sorted(found.types), found.stored_as) == (3 * 256, ["F32", "Q4_0", "Q8_0"], "float16")


def test_what_is_one(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"GGU")
    assert gguf_file.is_gguf(file)
    assert not gguf_file.is_gguf(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"GGML" + data[4:], "does not begin as a GGUF file does"),
        (lambda data: data[:4], "cut short: its head"),
        (lambda data: data[:30], "cut short: its head"),
        (lambda data: data[:200], "cut short: its head"),
        (lambda data: data[:-33], "cut short: the last 17 bytes of its weights"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "unknown version 1"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:], "cut short|type"),
        (lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:], "cut short|type"),
        (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], "cut short: its head"),
        (lambda data: data.replace(b"general.architecture", b"general.\xff\xferchitecture"[:20]), "UTF-8"),
        (lambda data: data[:24] + (data[24:].replace(struct.pack("<I", 8), struct.pack("<I", 77), 1)), "type 77"),
    ],
)
def test_broken_files(file: Path, tmp_path: Path, change: Callable[[bytes], bytes], reason: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(change(file.read_bytes()))
    with pytest.raises(BrokenGGUF, match=reason):
        gguf_file.read(str(broken))


def test_no_cut_and_no_byte_crashes_it(file: Path, tmp_path: Path) -> None:
    """Wherever it is cut, and whichever byte of its head is another, it is read or refused."""
    data, broken = file.read_bytes(), tmp_path / "broken.gguf"
    for at in range(4, 700, 3):
        for bad in (data[:at], data[:at] + b"\xff" + data[at + 1 :]):
            broken.write_bytes(bad)
            try:
                gguf_file.read(str(broken))
            except BrokenGGUF as error:
                assert str(error)  # noqa: PT017  # nothing is expected in particular


@pytest.mark.parametrize(
    ("kinds", "stored_as"),
    [
        (["F32"], "float32"),
        (["F32", "BF16"], "bfloat16"),
        (["F32", "F16"], "float16"),
        (["BF16", "F16"], "float16"),
        (["Q4_K", "F32"], "float16"),
    ],
)
def test_what_holds_every_weight(kinds: list[str], stored_as: str) -> None:
    tensors = tuple(gguf_file.Tensor(kind, 32, gguf.GGMLQuantizationType[kind]) for kind in kinds)
    assert gguf_file.GGUFFile({}, tensors).stored_as == stored_as


def test_what_can_not_be_decoded() -> None:
    tensors = tuple(gguf_file.Tensor(kind, 32, gguf.GGMLQuantizationType[kind]) for kind in ("Q5_0", "IQ4_XS", "I8"))
    assert gguf_file.GGUFFile({}, tensors).undecodable() == ["I8"]
