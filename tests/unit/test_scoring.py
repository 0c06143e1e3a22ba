import pytest
from transformers import AutoTokenizer

from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.scoring import _check_sizes, _joined, candidate_score, token_texts
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
