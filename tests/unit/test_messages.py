"""Messages of the wire -> OpenAI messages."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.messages import (
    MOST_CALLS,
    MOST_CALLS_TEXT,
    MOST_DEPTH,
    MOST_JSON_TEXT,
    MOST_MESSAGES,
    ROLES,
    openai_messages,
    parse_json,
)
from common.pb import backend_pb2 as pb

TEXT = st.text()  # without surrogates, which protobuf has none of either
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


def one(**fields: Any) -> dict[str, Any]:
    (message,) = openai_messages([pb.Message(**fields)])
    return message


def call(arguments: Any, **extra: Any) -> str:
    return json.dumps([{"index": 0, "id": "c1", "function": {"name": "f", "arguments": arguments}} | extra])


@pytest.mark.parametrize("role", ROLES)
def test_role_and_content(role: str) -> None:
    assert one(role=role, content="hi") == {"role": role, "content": "hi"}


@pytest.mark.parametrize("role", ["", "User", "human", "bot", " user", "user\0"])
def test_unknown_role(role: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_messages([pb.Message(role="user"), pb.Message(role=role)])
    assert caught.value.field == "Messages[1].role"
    assert repr(role) in str(caught.value)
    assert all(allowed in str(caught.value) for allowed in ROLES)


def test_order_and_empty_content_are_kept() -> None:
    messages = [pb.Message(role="user", content=text) for text in ("b", "", "a")]
    assert [message["content"] for message in openai_messages(messages)] == ["b", "", "a"]
    assert openai_messages([]) == []


def test_more_than_are_read() -> None:
    message = pb.Message(role="user")
    assert len(openai_messages([message] * MOST_MESSAGES)) == MOST_MESSAGES
    with pytest.raises(InvalidRequest, match=r"^Messages: has 20001; use at most 20000$"):
        openai_messages([message] * (MOST_MESSAGES + 1))


def test_more_calls_than_are_read() -> None:
    call = {"function": {"name": "f"}}
    half = pb.Message(role="assistant", tool_calls=json.dumps([call] * (MOST_CALLS // 2)))
    assert len(openai_messages([half, half])) == 2
    with pytest.raises(InvalidRequest, match=r"^Messages: has 20001 tool calls; use at most 20000$"):
        openai_messages([half, half, pb.Message(role="assistant", tool_calls=json.dumps([call]))])


def test_json_is_measured_before_it_is_read() -> None:
    text = json.dumps("a" * (MOST_JSON_TEXT - 2))
    assert parse_json("F", text) == "a" * (MOST_JSON_TEXT - 2)
    with pytest.raises(InvalidRequest, match=r"^F: has 2000001 characters; use at most 2000000$"):
        parse_json("F", text + " ")
    half = pb.Message(role="assistant", tool_calls=call({"a": "b" * (MOST_CALLS_TEXT // 2 - 100)}))
    assert len(openai_messages([half, half])) == 2
    with pytest.raises(InvalidRequest, match=r"^Messages: has \d+ characters of tool calls; use at most 8000000$"):
        openai_messages([half, half, pb.Message(role="assistant", tool_calls=" " * 200)])


def test_optional_fields() -> None:
    assert one(role="tool", content="18", name="f", tool_call_id="c1") == {
        "role": "tool",
        "content": "18",
        "name": "f",
        "tool_call_id": "c1",
    }
    assert one(role="assistant", content="x", reasoning_content="y")["reasoning_content"] == "y"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Paris"}', {"city": "Paris"}),
        ({"city": "東京"}, {"city": "東京"}),
        ('{"deep": {"list": [1, null, true]}}', {"deep": {"list": [1, None, True]}}),
        ("{}", {}),
        ("", {}),
        (" ", {}),
        ("null", {}),
        (None, {}),
        # What a limit has cut, and what a careless client has made of arguments, is no reason to end a conversation.
        ('{"city": "Par', {}),
        ("5", {}),
        ("[1]", {}),
        ('{"x": NaN}', {}),
        ('{"x": "\\ud800"}', {}),
        pytest.param("[" * 100_000, {}, id="deep"),
    ],
)
def test_arguments_are_an_object_once_encoded(arguments: Any, expected: dict[str, Any]) -> None:
    (tool_call,) = one(role="assistant", tool_calls=call(arguments))["tool_calls"]
    assert tool_call["id"] == "c1"
    assert tool_call["type"] == "function"
    assert tool_call["function"]["name"] == "f"
    assert json.loads(tool_call["function"]["arguments"]) == expected
    assert "\\u" not in tool_call["function"]["arguments"]


def test_calls_without_text_have_null_for_content() -> None:
    assert one(role="assistant", tool_calls=call("{}"))["content"] is None
    assert one(role="assistant", content="wait", tool_calls=call("{}"))["content"] == "wait"


@pytest.mark.parametrize("text", ["", " ", "null", "[]"])
def test_no_calls(text: str) -> None:
    assert one(role="assistant", content="", tool_calls=text) == {"role": "assistant", "content": ""}
    assert one(role="user", content="x", tool_calls=text) == {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", ""),
        ("{}", ""),
        ('"x"', ""),
        ("5", ""),
        ("[5]", "[0]"),
        ("[null]", "[0]"),
        ("[{}]", "[0]"),
        ('[{"function": "f"}]', "[0]"),
        ('[{"function": {}}]', "[0]"),
        ('[{"function": {"name": ""}}]', "[0]"),
        ('[{"function": {"name": 5}}]', "[0]"),
        (call(5), "[0].function.arguments"),
        (call([1]), "[0].function.arguments"),
        (call("{}")[:-1] + ', {"function": {"name": "g", "arguments": 5}}]', "[1].function.arguments"),
        pytest.param("[" * 100_000, "", id="deep"),
    ],
)
def test_calls_that_cannot_be_used(text: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        one(role="assistant", tool_calls=text)
    assert caught.value.field == f"Messages[0].tool_calls{field}"


@pytest.mark.parametrize("role", [role for role in ROLES if role != "assistant"])
def test_only_an_assistant_makes_calls(role: str) -> None:
    with pytest.raises(InvalidRequest, match="assistant"):
        one(role=role, tool_calls=call("{}"))


@given(st.dictionaries(TEXT, JSON, max_size=4))
def test_any_arguments_arrive(arguments: dict[str, Any]) -> None:
    for spelled in (arguments, json.dumps(arguments)):
        (tool_call,) = one(role="assistant", tool_calls=call(spelled))["tool_calls"]
        assert json.loads(tool_call["function"]["arguments"]) == arguments


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
