"""vLLM's log-probabilities -> OpenAI's entries with token ids."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.logprobs import Logprob

from common.logprobs import LOWEST, logprob_entries, logprob_texts

# As vLLM gives them: the sampled token first, then the likeliest by rank.
GREEDY = {5: Logprob(-0.1, 1, "é"), 6: Logprob(-2.0, 2, " b"), 7: Logprob(-3.0, 3, "c")}
UNLIKELY = {9: Logprob(-4.0, 12, "z"), 5: Logprob(-0.1, 1, "a"), 6: Logprob(-2.0, 2, "b")}


def test_entries() -> None:
    assert logprob_entries([5], [GREEDY], 2) == [
        {
            "id": 5,
            "token": "é",
            "bytes": [195, 169],
            "logprob": -0.1,
            "top_logprobs": [
                {"id": 5, "token": "é", "bytes": [195, 169], "logprob": -0.1},
                {"id": 6, "token": " b", "bytes": [32, 98], "logprob": -2.0},
            ],
        }
    ]


@pytest.mark.parametrize(("top", "ids"), [(0, []), (1, [5]), (2, [5, 6]), (3, [5, 6, 7]), (20, [5, 6, 7])])
def test_as_many_alternatives_as_asked_for(top: int, ids: list[int]) -> None:
    (entry,) = logprob_entries([5], [GREEDY], top)
    assert [other["id"] for other in entry["top_logprobs"]] == ids


@pytest.mark.parametrize(("top", "ids"), [(0, []), (1, [9]), (2, [9, 5])])
def test_the_sampled_token_comes_first_as_in_vllms_own_answers(top: int, ids: list[int]) -> None:
    (entry,) = logprob_entries([9], [UNLIKELY], top)
    assert (entry["id"], entry["logprob"]) == (9, -4.0)
    assert [other["id"] for other in entry["top_logprobs"]] == ids


def test_one_entry_per_token_in_order() -> None:
    entries = logprob_entries([9, 5, 5], [UNLIKELY, GREEDY, GREEDY], 0)
    assert [entry["id"] for entry in entries] == [9, 5, 5]
    assert logprob_entries([], [], 5) == []


def test_a_token_without_its_logprobs_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        logprob_entries([5, 6], [GREEDY], 0)
    with pytest.raises(KeyError):
        logprob_entries([99], [GREEDY], 0)


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30])
def test_numbers_that_json_lacks(value: float) -> None:
    (entry,) = logprob_entries([5], [{5: Logprob(value, 1, "x")}], 1)
    assert entry["logprob"] == LOWEST
    assert entry["top_logprobs"][0]["logprob"] == LOWEST


def test_a_token_that_is_no_text() -> None:
    (entry,) = logprob_entries([5], [{5: Logprob(-1.0, 1, None)}], 0)
    assert (entry["token"], entry["bytes"]) == ("", [])


@given(st.dictionaries(st.integers(0, 9), st.tuples(st.floats(max_value=0), st.text()), min_size=1), st.integers(0, 20))
def test_any_entry_is_json(candidates: dict[int, tuple[float, str]], top: int) -> None:
    position = {token_id: Logprob(value, None, text) for token_id, (value, text) in candidates.items()}
    for token_id in position:
        entries = logprob_entries([token_id], [position], top)
        assert [json.loads(text) for text in logprob_texts([token_id], [position], top)] == entries
        assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]
