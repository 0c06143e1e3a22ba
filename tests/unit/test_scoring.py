import types
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.scoring import Scorer, _check_sizes, _joined, candidate_score, token_texts
from common.tokens import MOST_CHARACTERS
from tests.models import ensure


def test_normalised_only_if_asked() -> None:
    score = candidate_score([-1.0, -2.0], [], normalize=True)
    assert (score.log_prob, score.length_normalized_log_prob, score.num_tokens) == (-3.0, -1.5, 2)
    assert not score.tokens
    assert candidate_score([-1.0, -2.0], [], normalize=False).length_normalized_log_prob == 0


def test_tokens_of_a_score() -> None:
    score = candidate_score([-1.0, -2.0], ["a", "b"], normalize=False)
    assert [(token.token, token.log_prob) for token in score.tokens] == [("a", -1.0), ("b", -2.0)]


@pytest.mark.parametrize(
    "text", ["", "plain text", " leading space", "<|im_end|>", "yes<|im_end|>\n", "東京 👩‍👩‍👧 naïve", "</think>\n\n"]
)
def test_texts_of_tokens_are_whole_characters_and_make_the_candidate(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ensure("scripted"))
    prompt = tuple(tokenizer.encode("<|im_start|>assistant\n"))
    candidate = tuple(tokenizer.encode(text, add_special_tokens=False))
    pieces = token_texts(tokenizer, prompt, candidate)
    assert len(pieces) == len(candidate)
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def sentencepiece(*, splits: bool) -> tokenizers.Tokenizer:
    """As Llama 2 has it, by a normalizer, or as later ones of its kind have it, by splitting."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁yesParisno", "▁▁"]
    merges = ["ye", "yes", "▁yes", "Pa", "Par", "Paris", "▁Paris", "is", "no", "▁no"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *merges, "ris", "ri"]))}
    pairs = [("y", "e"), ("ye", "s"), ("▁", "yes"), ("P", "a"), ("r", "i"), ("ri", "s"), ("Pa", "ris"), ("▁", "Paris")]
    model = models.BPE(vocabulary, [*pairs, ("n", "o"), ("▁", "no")], byte_fallback=True)
    model.unk_token = "<unk>"  # noqa: S105  # no password
    tokenizer = tokenizers.Tokenizer(model)
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def scorer(tokenizer: tokenizers.Tokenizer) -> Scorer:
    async def tokenize_prompts_async(prompts: Sequence[dict[str, str]], params: Any) -> list[dict[str, list[int]]]:
        special = params.add_special_tokens
        return [{"prompt_token_ids": tokenizer.encode(it["prompt"], add_special_tokens=special).ids} for it in prompts]

    renderer = types.SimpleNamespace(tokenize_prompts_async=tokenize_prompts_async)
    adapters: Any = None
    engine: Any = types.SimpleNamespace(llm=types.SimpleNamespace(renderer=renderer))
    return Scorer(engine, adapters)


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize(
    ("candidate", "pieces"),
    [("yes", ["yes"]), (" Paris", ["▁Paris"]), ("yes no", ["yes", "▁no"]), ("\n", ["<0x0A>"]), (" ", ["▁"])],
)
async def test_a_candidate_goes_on_and_begins_no_text(splits: bool, candidate: str, pieces: list[str]) -> None:
    tokenizer = sentencepiece(splits=splits)
    if not splits:  # where a text with a space gets none
        assert tokenizer.encode(candidate, add_special_tokens=False).tokens != pieces
    prompt, (tokens,) = await scorer(tokenizer)._tokens(pb.ScoreRequest(prompt="no\n", candidates=[candidate]))
    assert [tokenizer.id_to_token(token) for token in prompt] == ["<s>", "▁no", "<0x0A>"]
    assert [tokenizer.id_to_token(token) for token in tokens] == pieces


async def test_where_no_space_is_added_nothing_is_taken_away() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(ensure("scripted") / "tokenizer.json"))
    texts = ["yes", " Paris", "\n", "東京", "<|im_end|>", "\ue000", "\ue000yes"]
    _, found = await scorer(tokenizer)._tokens(pb.ScoreRequest(prompt="a", candidates=texts))
    assert [list(tokens) for tokens in found] == [
        tokenizer.encode(text, add_special_tokens=False).ids for text in texts
    ]


@pytest.mark.parametrize("tokenizer", [sentencepiece(splits=False), None])
async def test_nothing_to_score(tokenizer: tokenizers.Tokenizer | None) -> None:
    tokenizer = tokenizer or tokenizers.Tokenizer.from_file(str(ensure("scripted") / "tokenizer.json"))
    with pytest.raises(InvalidRequest, match=r"candidates\[1\]: has no token"):
        await scorer(tokenizer)._tokens(pb.ScoreRequest(prompt="a", candidates=["yes", ""]))


@pytest.mark.parametrize(
    ("beginning", "prompt", "joined"),
    [
        ((), (3, 4), (3, 4)),
        ((1,), (3, 4), (1, 3, 4)),
        ((1,), (1, 3, 4), (1, 3, 4)),
        ((1,), (), (1,)),
    ],
)
def test_a_beginning_is_written_once(
    beginning: tuple[int, ...], prompt: tuple[int, ...], joined: tuple[int, ...]
) -> None:
    assert _joined(beginning, prompt) == joined


def test_sizes() -> None:
    _check_sizes(pb.ScoreRequest(prompt="p", candidates=["a"] * 3), 3)
    with pytest.raises(InvalidRequest, match="candidates: is empty"):
        _check_sizes(pb.ScoreRequest(prompt="p"), 3)
    with pytest.raises(InvalidRequest, match="candidates: has 4; no more than 3 requests"):
        _check_sizes(pb.ScoreRequest(prompt="p", candidates=["a"] * 4), 3)
    with pytest.raises(InvalidRequest, match=f"have {MOST_CHARACTERS + 1} characters together"):
        _check_sizes(pb.ScoreRequest(prompt="p" * MOST_CHARACTERS, candidates=["a"]), 3)
