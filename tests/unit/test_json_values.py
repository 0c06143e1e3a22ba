"""JSON in a field of the wire."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.json_values import MOST_DEPTH, MOST_JSON_TEXT, contents, parse_json

TEXT = st.text()  # without surrogates, which protobuf has none of either
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


def test_it_is_measured_before_it_is_read() -> None:
    text = json.dumps("a" * (MOST_JSON_TEXT - 2))
    assert parse_json("F", text) == "a" * (MOST_JSON_TEXT - 2)
    with pytest.raises(InvalidRequest, match=r"^F: has 2000001 characters; use at most 2000000$"):
        parse_json("F", "[" * (MOST_JSON_TEXT + 1))


@given(JSON)
def test_json(value: Any) -> None:
    assert parse_json("Field", json.dumps(value)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "nope",
        "[1,]",
        "NaN",
        "-Infinity",
        '{"a": [Infinity]}',
        "1e999",
        '{"a": -1e999}',
        pytest.param("9" * 5000, id="huge number"),
        pytest.param("[" * 100_000, id="deep list"),
        pytest.param('{"a":' * 100_000, id="deep object"),
    ],
)
def test_not_json(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_json("Field", text)
    assert caught.value.field == "Field"
    assert len(str(caught.value)) < 300


def test_json_says_where() -> None:
    with pytest.raises(InvalidRequest, match="line 1 column 5"):
        parse_json("Field", "[1, }")


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"\udfff": 1}', r'["a", {"b": "x\ud83dy"}]'])
def test_half_a_surrogate_pair_does_not_come_through(text: str) -> None:
    # Neither protobuf nor a tokenizer nor a status message can carry one.
    try:
        value = parse_json("Field", text)
    except InvalidRequest:
        return
    json.dumps(value, ensure_ascii=False).encode()


def test_a_whole_surrogate_pair_is_one_character() -> None:
    assert parse_json("Field", r'"\ud83d\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize(
    ("opening", "inner", "closing"),
    [("[", "1", "]"), ('{"a":', "{}", "}"), ('[{"a":[', "", "]}]")],
    ids=["arrays", "objects", "both"],
)
def test_depth(opening: str, inner: str, closing: str) -> None:
    levels = opening.count("[") + opening.count("{")
    most = (MOST_DEPTH - inner.count("{")) // levels
    assert parse_json("Tools", opening * most + inner + closing * most) is not None
    for times in (most + 1, 500, 5000, 100_000):
        with pytest.raises(InvalidRequest) as caught:
            parse_json("Tools", opening * times + inner + closing * times)
        assert str(caught.value).startswith("Tools: is nested too deep; use at most 64 ")


def test_depth_is_not_length() -> None:
    wide = json.dumps([{"a": [index]} for index in range(10_000)])
    assert len(parse_json("Tools", wide)) == 10_000
    assert parse_json("Tools", json.dumps("[" * 1000)) == "[" * 1000


def test_contents_are_all_of_a_value() -> None:
    value = {"a": [1, {"b": None}, ("c", [])], "d": "e"}
    found = list(contents(value))
    assert sorted(each for each in found if isinstance(each, str)) == ["a", "b", "c", "d", "e"]
    assert found[0] is value
    assert len(found) == 12
