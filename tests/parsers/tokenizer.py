"""A small byte-level BPE tokenizer with the special tokens of one format.

Its merges are written, not trained, so that the same text always falls into the same tokens: a few pieces of words and
of JSON and XML as real vocabularies have them, and single bytes for the rest, which cuts an emoji into four tokens.
"""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.protocol.instruct.validator import ValidationMode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralCommonBackend, PreTrainedTokenizerFast
from vllm.entrypoints.openai.parser.harmony_utils import get_encoding
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tokenizers.mistral import MistralTokenizer
from vllm.utils.mistral import is_mistral_tokenizer

EOS = "<|test_eos|>"
PIECES = (
    *("get", " the", "city", "Par", "Paris", "name", "arguments", "parameters", "function", "para", "meter", "tool"),
    *("think", "call", "arg", "value", "key", "string", "type", "title", "guests", "when", "note", "weather", "time"),
    *('{"', '":', '": ', '", "', '"}', '"}}', '":{"', '": {"', '"},', "}}", "}]", "[{", '="', '">', "\n\n", "}\n"),
    *("</", "<|", "|>", "><", ">\n", ")]", "(", "='", "',", " I", " look", "ing", "er", "is", "in", "qu", "\\n", "\\u"),
)
_BUNDLED = Path(str(mistral_common.__file__)).parent / "data"
_MISTRAL_PIECES = 1000
# The first version with tokens for thoughts, and the first whose prompts say how the model is to think.
_MISTRAL_THOUGHTS, _MISTRAL_SETTINGS = 13, 15
_MISTRAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]"),
    *("[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
)


@cache
def _alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _vocabulary(
    first: Iterable[tuple[str, str]], without: Iterable[str], ids: Mapping[str, int]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet = _alphabet()
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet.values())}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if left + right not in vocabulary:
            merges.append((left, right))
            vocabulary[left + right] = len(vocabulary)

    def symbols(text: str) -> list[str]:
        return [alphabet[byte] for byte in text.encode()]

    for left, right in first:
        merge("".join(symbols(left)), "".join(symbols(right)))
    unwanted = set(without)
    for piece in PIECES:
        if piece not in unwanted:
            merged, *rest = symbols(piece)
            for symbol in rest:
                merge(merged, symbol)
                merged += symbol
    return vocabulary | {"".join(symbols(text)): number for text, number in ids.items()}, merges


def make_tokenizer(
    special: Iterable[str] = (),
    added: Iterable[str] = (),
    *,
    first: Iterable[tuple[str, str]] = (),
    without: Iterable[str] = (),
    ids: Mapping[str, int] | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """A tokenizer as vLLM holds one.

    `added` are tokens of their own that count as text, as most tool markers do. `first` are merges before all others,
    `without` pieces to leave out, `ids` the numbers that a parser knows by heart, and `attributes` what a checkpoint's
    tokenizer configuration declares.
    """
    vocabulary, merges = _vocabulary(first, without, ids or {})
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS, clean_up_tokenization_spaces=False)
    if special := list(special):
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    if added := list(added):
        tokenizer.add_tokens(added)
    for name, value in (attributes or {}).items():
        setattr(tokenizer, name, value)
    return get_cached_tokenizer(tokenizer)


class HarmonyTokenizer:
    """gpt-oss' own vocabulary, as much of a tokenizer as vLLM's detokenizer asks for; its parser reads token ids."""

    is_fast = False

    def __init__(self) -> None:
        self._encoding = get_encoding()
        (self.eos_token_id,) = self._encoding.encode("<|return|>", allowed_special="all")

    def __len__(self) -> int:
        return int(self.eos_token_id) + 20_000

    def encode(self, text: str, **_options: Any) -> list[int]:
        return list(self._encoding.encode(text, allowed_special="all"))

    def decode(self, ids: Iterable[int], **_options: Any) -> str:
        return str(self._encoding.decode(list(ids)))

    def convert_ids_to_tokens(self, ids: Iterable[int], **_options: Any) -> list[str]:
        return [self.decode([number]) for number in ids]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        return "".join(tokens)

    def get_vocab(self) -> dict[str, int]:
        return {}

    get_added_vocab = get_vocab


def tokenizer_for(
    special: Iterable[str], added: Iterable[str], *, tekken: str = "", harmony: bool = False, **options: Any
) -> Any:
    """The tokenizer of a format: the one that mistral_common or openai_harmony brings, otherwise one made here."""
    if harmony:
        return HarmonyTokenizer()
    if tekken:
        return _mistral(_BUNDLED / tekken)
    return make_tokenizer(special, added, **options)


def mistral_tokenizer(version: int, folder: Path) -> MistralTokenizer:
    """As models of Mistral's have them, of a version that mistral_common brings none of, and with few pieces."""
    tekken = json.loads((_BUNDLED / "tekken_240911.json").read_text(encoding="utf-8"))
    texts = [text for text in _MISTRAL_TOKENS if version >= _MISTRAL_THOUGHTS or "THINK" not in text]
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(texts)]
    sizes = {
        "num_vocab_tokens": _MISTRAL_PIECES,
        "default_vocab_size": _MISTRAL_PIECES + len(special),
        "default_num_special_tokens": len(special),
    }
    tekken["config"] |= {"version": f"v{version}"} | sizes
    tekken |= {"vocab": tekken["vocab"][:_MISTRAL_PIECES], "special_tokens": special}
    if version >= _MISTRAL_SETTINGS:
        effort = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
        tekken["model_settings_builder"] = {"reasoning_effort": effort}
    file = folder / "tekken.json"
    file.write_text(json.dumps(tekken), encoding="utf-8")
    return _mistral(file)


def _mistral(file: Path) -> MistralTokenizer:
    return MistralTokenizer(MistralCommonBackend(file, mode=ValidationMode.test))


def encode(tokenizer: Any, text: str, special: Iterable[str]) -> list[int]:
    """Token ids, special tokens read as such, which Mistral's tokenizer does not do by itself."""
    if not is_mistral_tokenizer(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=False))
    marks = "|".join(map(re.escape, special))
    ids: list[int] = []
    for part in filter(None, re.split(f"({marks})", text)):
        ids += (
            tokenizer.convert_tokens_to_ids([part])
            if part in special
            else tokenizer.encode(part, add_special_tokens=False)
        )
    return ids
