"""Messages of the wire -> OpenAI messages."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.messages import MOST_CALLS, MOST_CALLS_TEXT, MOST_MESSAGES, ROLES, openai_messages
from common.pb import backend_pb2 as pb
from tests.unit.test_json_values import JSON, TEXT


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


def test_calls_are_measured_before_they_are_read() -> None:
    half = pb.Message(role="assistant", tool_calls=call(json.dumps({"a": "b" * (MOST_CALLS_TEXT // 2 - 200)})))
    first, _ = openai_messages([half, half])
    assert len(first["tool_calls"][0]["function"]["arguments"]) > MOST_CALLS_TEXT // 2 - 200
    with pytest.raises(InvalidRequest, match=r"^Messages: has \d+ characters of tool calls; use at most 8000000$"):
        openai_messages([half, half, pb.Message(role="assistant", tool_calls="[" * 1000)])


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
