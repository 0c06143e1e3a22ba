"""What is in the folder that a GGUF file is converted into, and why some files are not converted."""

import contextlib
import json
import os
import re
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import gguf_conversion
from tests.models import ensure, gguf_files
from tests.models.script import script

TEXTS = ["What is 17 + 25?", "  two  spaces\n\n", "naïve café 😀 日本", "<think>a</think><|im_end|>", "don't I'll 1234"]


@pytest.fixture(scope="module")
def scripted() -> Path:
    return ensure("scripted")


def convert(source: Path, folder: Path, stored_as: str | None = "float16") -> list[tuple[str, str]]:
    """What it says while it converts, here instead of in a process, and so an environment, of its own."""
    receiver, sender = Pipe(duplex=False)
    before = dict(os.environ)
    try:
        gguf_conversion.run(str(source), str(folder), stored_as, sender)
    finally:
        os.environ.clear()
        os.environ.update(before)
        sender.close()
    said = []
    with receiver, contextlib.suppress(EOFError):
        while True:
            said.append(receiver.recv())
    return said


def problem(source: Path, folder: Path) -> str:
    kind, text = convert(source, folder)[-1]
    assert kind == gguf_conversion.PROBLEM
    assert not folder.exists()
    return text


def test_nothing_is_lost_of_full_precision(scripted: Path, tmp_path: Path) -> None:
    source = gguf_files.write(scripted, tmp_path / "model.gguf", "F32")
    said = convert(source, tmp_path / "made", "float32")
    assert [text for _, text in said][:2] == ["importing transformers", "reading the vocabulary"]
    assert ("stage", "unpacking the weights, 50 % done") in said
    assert said[-1] == ("stage", "writing the weights")
    made, original = load_file(tmp_path / "made/model.safetensors"), load_file(scripted / "model.safetensors")
    assert made.keys() == original.keys()
    for name, weight in original.items():
        assert torch.equal(made[name], weight), name
    config, known = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "made", scripted))
    for key in ("architectures", "hidden_size", "num_hidden_layers", "rope_parameters", "tie_word_embeddings", "dtype"):
        assert config[key] == known[key]
    assert json.loads((tmp_path / "made/source.json").read_text()) == {"source": str(source)}
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "made").iterdir())


def test_tokenizer_and_template(scripted: Path, tmp_path: Path) -> None:
    convert(gguf_files.write(scripted, tmp_path / "model.gguf"), tmp_path / "made", None)
    made, known = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "made", scripted))
    for text in TEXTS + [exchange.answer for exchange in script()]:
        assert made(text).input_ids == known(text).input_ids
        for skip in (True, False):
            decoded = (each.decode(each(text).input_ids, skip_special_tokens=skip) for each in (made, known))
            assert next(decoded) == next(decoded)
    assert made.chat_template == known.chat_template
    assert (made.eos_token, made.pad_token) == (known.eos_token, known.pad_token)
    ends = GenerationConfig.from_pretrained(tmp_path / "made").eos_token_id
    assert ends == sorted(known.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))


def test_without_weights(scripted: Path, tmp_path: Path) -> None:
    source = gguf_files.write(scripted, tmp_path / "model.gguf", "Q8_0")
    convert(source, tmp_path / "made", None)
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not [name for name in names if "safetensors" in name]
    config = json.loads((tmp_path / "made/config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")


@pytest.mark.parametrize(("kind", "stored_as"), [("Q8_0", "float16"), ("Q5_1", "float16"), ("BF16", "bfloat16")])
def test_weights_as_transformers_unpacks_them(kind: str, stored_as: str, scripted: Path, tmp_path: Path) -> None:
    source = gguf_files.write(scripted, tmp_path / "model.gguf", kind)
    convert(source, tmp_path / "made", stored_as)
    dtype = getattr(torch, stored_as)
    known = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=dtype).state_dict()
    made = load_file(tmp_path / "made/model.safetensors")
    assert made.keys() <= known.keys()
    for name, weight in made.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, known[name]), name
    embedded = gguf.GGUFReader(source).tensors[0]
    assert embedded.name == "token_embd.weight"
    exact = torch.from_numpy(np.copy(gguf.dequantize(embedded.data, embedded.tensor_type)))
    assert torch.equal(made["model.embed_tokens.weight"], exact.to(dtype))
    assert json.loads((tmp_path / "made/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("wanted", [True, False])
def test_whether_prompts_begin_with_bos(wanted: bool, scripted: Path, tmp_path: Path) -> None:
    bos = AutoTokenizer.from_pretrained(scripted).convert_tokens_to_ids("<|im_start|>")
    entries = {"tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.add_bos_token": wanted}
    convert(gguf_files.write(scripted, tmp_path / "model.gguf", metadata=entries), tmp_path / "made", None)
    made = AutoTokenizer.from_pretrained(tmp_path / "made")
    ids = AutoTokenizer.from_pretrained(scripted)("a b").input_ids
    assert made("a b").input_ids == [bos] * wanted + ids
    assert made("a b", add_special_tokens=False).input_ids == ids
    assert made.bos_token_id == bos


def test_a_sentencepiece_vocabulary_that_begins_with_bos(scripted: Path, tmp_path: Path) -> None:
    """As Llama 2 has it: transformers says BOS for this kind, or it does not; the file decides."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "ab"]
    words += [f"<unused{index}>" for index in range(775 - len(words))]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)]
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(words))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": None,
    }
    for wanted in (True, False):
        source = gguf_files.write(
            scripted, tmp_path / "model.gguf", metadata=entries | {"tokenizer.ggml.add_bos_token": wanted}
        )
        convert(source, tmp_path / f"made-{wanted}", None)
        made = AutoTokenizer.from_pretrained(tmp_path / f"made-{wanted}")
        assert made("a b").input_ids == [1] * wanted + [words.index("▁a"), words.index("▁b")]


def test_a_split_of_text_that_transformers_lacks_is_said(scripted: Path, tmp_path: Path) -> None:
    source = gguf_files.write(scripted, tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": "smollm"})
    said = convert(source, tmp_path / "made", None)
    assert [text for kind, text in said if kind == gguf_conversion.WARNING] == [
        "transformers splits text as GPT-2's tokenizer does, not as 'smollm'; Tokenizer takes a more exact one"
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": {"blk.1.attn_q.weight": None}}, "it has no weights for model.layers.1.self_attn.q_proj.weight"),
        (
            {"tensors": {"blk.0.attn_sinks.weight": np.ones(8), "blk.9.ffn_up.weight": np.ones(8)}},
            "transformers has no place in LlamaForCausalLM for blk.0.attn_sinks.weight, blk.9.ffn_up.weight",
        ),
        ({"tensors": {"output_norm.weight": np.full(128, np.nan)}}, "some of its weights are no numbers, or beyond"),
        ({"tensors": {"output_norm.weight": np.full(128, 1e6)}}, "beyond what float16 holds"),
        (
            {"metadata": {"llama.embedding_length": 64}},
            "its metadata describe another shape for .*embed",
        ),
        ({"metadata": {"llama.rope.scaling.type": "spiral", "llama.rope.scaling.factor": 2.0}}, "scaled as 'spiral'"),
    ],
)
def test_what_is_not_converted(changes: dict[str, Any], reason: str, scripted: Path, tmp_path: Path) -> None:
    source = gguf_files.write(scripted, tmp_path / "model.gguf", "F32", **changes)
    said = problem(source, tmp_path / "made")
    assert re.search(reason, said), said
    assert "\n" not in said
    assert len(said) < 600


def test_what_lies_beside_the_file_is_not_looked_at(scripted: Path, tmp_path: Path) -> None:
    source = gguf_files.write(scripted, tmp_path / "model.gguf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text('{"model_type": "nothing", "vocab_size": 3}')
    (tmp_path / "chat_template.jinja").write_text("another")
    convert(source, tmp_path / "made", None)
    assert AutoTokenizer.from_pretrained(tmp_path / "made").chat_template != "another"
    assert json.loads((tmp_path / "made/config.json").read_text())["vocab_size"] == 775
