"""Sampling fields: which zeros are off, which unset, and what is refused."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.sampling import MAX_BIASES, MAX_STOP_STRINGS, logprobs_asked, sampling_fields

NAMES = {
    "Temperature": "temperature",
    "TopP": "top_p",
    "TopK": "top_k",
    "MinP": "min_p",
    "Penalty": "repetition_penalty",
    "FrequencyPenalty": "frequency_penalty",
    "PresencePenalty": "presence_penalty",
    "Seed": "seed",
    "StopPrompts": "stop",
    "IgnoreEOS": "ignore_eos",
    "LogitBias": "logit_bias",
}


def fields(**options: Any) -> dict[str, Any]:
    return sampling_fields(pb.PredictOptions(**options), max_logprobs=20)


def test_nothing_set() -> None:
    assert fields() == {
        "temperature": 0.0,
        "top_p": None,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": None,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "seed": 0,
        "stop": [],
        "ignore_eos": False,
        "logit_bias": None,
    }


@pytest.mark.parametrize(
    ("field", "given", "expected"),
    [
        ("Temperature", 0.0, 0.0),
        ("Temperature", 0.7, 0.7),
        ("Temperature", 2.0, 2.0),
        ("TopP", 0.0, None),
        ("TopP", 0.95, 0.95),
        ("TopP", 1.0, 1.0),
        ("TopK", 0, 0),
        ("TopK", -1, 0),
        ("TopK", 40, 40),
        ("MinP", 0.05, 0.05),
        ("MinP", 1.0, 1.0),
        ("Penalty", 0.0, None),
        ("Penalty", 1.1, 1.1),
        ("FrequencyPenalty", -2.0, -2.0),
        ("PresencePenalty", 1.5, 1.5),
        ("Seed", -1, None),
        ("Seed", 0, 0),
        ("Seed", -2, -2),
        ("Seed", 2**31 - 1, 2**31 - 1),
        ("StopPrompts", list("edcbaedcba"), list("edcba")),
        ("StopPrompts", [" "], [" "]),
        ("IgnoreEOS", True, True),
        ("LogitBias", "", None),
        ("LogitBias", " \n", None),
        ("LogitBias", "null", None),
        ("LogitBias", "{}", None),
        ("LogitBias", '{"15": -100, "7": 0.5}', {"15": -100, "7": 0.5}),
    ],
)
def test_value(field: str, given: Any, expected: Any) -> None:
    assert fields(**{field: given}) == fields() | {NAMES[field]: expected}


def test_the_stop_strings_are_a_list_of_our_own() -> None:
    # vLLM refuses protobuf's container.
    assert type(fields(StopPrompts=["a"])["stop"]) is list


@pytest.mark.parametrize(
    ("field", "given", "allowed"),
    [
        *((field, value, "a number from 0 to 2") for field in ("Temperature",) for value in (-0.1, 2.1)),
        *((field, value, "a number from 0 to 1") for field in ("TopP", "MinP") for value in (-0.1, 1.01)),
        *(
            (field, value, "a number from -2 to 2")
            for field in ("FrequencyPenalty", "PresencePenalty")
            for value in (-2.1, 2.1)
        ),
        ("Penalty", -0.1, "0 or more"),
        *(
            (field, value, "use ")
            for field in ("Temperature", "TopP", "MinP", "Penalty", "FrequencyPenalty", "PresencePenalty")
            for value in (math.nan, math.inf, -math.inf)
        ),
        ("TopK", -2, "0 or -1 for off"),
        ("StopPrompts", ["a", ""], "leave it out"),
        pytest.param(
            "StopPrompts", list(map(str, range(MAX_STOP_STRINGS + 1))), f"at most {MAX_STOP_STRINGS}", id="many"
        ),
        *(
            ("LogitBias", text, "JSON")
            for text in ("{", "[1]", "5", '"x"', "true", '{"a": 1}', '{"-1": 1}', '{"1.5": 1}', '{"": 1}')
        ),
        *(
            ("LogitBias", f'{{"1": {bias}}}', "JSON")
            for bias in ("true", "null", '"1"', "101", "-100.5", "NaN", "-Infinity", "1e999", "[1]", "9" * 400)
        ),
        pytest.param("LogitBias", "[" * 100_000, "nested too deep", id="deep"),
        pytest.param(
            "LogitBias", json.dumps(dict.fromkeys(range(MAX_BIASES + 1), 1)), f"at most {MAX_BIASES}", id="many biases"
        ),
        ("Logprobs", -1, "from 0 to 20"),
        ("Logprobs", 21, "from 0 to 20"),
        ("TopLogprobs", -1, "from 0 to 20"),
        ("TopLogprobs", 21, "from 0 to 20"),
    ],
)
def test_refused(field: str, given: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        fields(**{field: given})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("logprobs", "top", "expected"), [(0, 0, None), (1, 0, 0), (5, 5, 5), (0, 3, 3), (1, 20, 20), (20, 1, 1)]
)
def test_logprobs(logprobs: int, top: int, expected: int | None) -> None:
    options = pb.PredictOptions(Logprobs=logprobs, TopLogprobs=top)
    assert logprobs_asked(options, 20) == expected
    assert sampling_fields(options, max_logprobs=20).get("top_logprobs") == expected


def test_the_engine_sets_the_limit_of_logprobs() -> None:
    assert logprobs_asked(pb.PredictOptions(TopLogprobs=50), 50) == 50
    with pytest.raises(InvalidRequest, match="from 0 to 5"):
        logprobs_asked(pb.PredictOptions(TopLogprobs=6), 5)


@given(st.floats(0, 2, width=32))
def test_floats_keep_what_the_wire_carries(value: float) -> None:
    assert fields(Temperature=value)["temperature"] == pytest.approx(value, rel=1e-6)


@given(st.decimals(0, 2, places=3).map(str))
def test_floats_read_as_they_were_written(text: str) -> None:
    assert fields(Temperature=float(text))["temperature"] == float(text)
