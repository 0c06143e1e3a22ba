"""Tools, and the many shapes of ToolChoice."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.tools import openai_tool_choice, openai_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
NAMED = {"type": "function", "function": {"name": "clock"}}


@pytest.mark.parametrize("text", ["", " \n", "null", "[]"])
def test_no_tools(text: str) -> None:
    assert openai_tools(text) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (WEATHER, WEATHER),
        (CLOCK, CLOCK),
        ({"function": {"name": "clock"}}, CLOCK),
        # As the orchestrator writes them: strict always there, parameters perhaps null.
        ({"type": "function", "function": {"name": "clock", "description": None, "parameters": None}}, CLOCK),
        (
            {"type": "function", "function": {"name": "clock", "description": "", "strict": False, "parameters": {}}},
            {"type": "function", "function": {"name": "clock", "description": "", "strict": False, "parameters": {}}},
        ),
        ({"type": "function", "function": {"name": "clock", "other": 5}, "more": 6}, CLOCK),
    ],
)
def test_a_tool(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert openai_tools(json.dumps([given])) == [expected]


def test_tools_keep_their_order() -> None:
    assert openai_tools(json.dumps(TOOLS)) == TOOLS


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "Tools"),
        ("{}", "Tools"),
        ('"auto"', "Tools"),
        pytest.param("[" * 100_000, "Tools", id="deep"),
        ("[5]", "Tools[0]"),
        ("[null]", "Tools[0]"),
        ('[{"type": "function"}]', "Tools[0]"),
        ('[{"type": "retrieval", "function": {"name": "x"}}]', "Tools[0]"),
        ('[{"type": ["function"], "function": {"name": "x"}}]', "Tools[0]"),
        ('[{"type": "function", "function": {"name": "f"}}, {"function": []}]', "Tools[1]"),
        ('[{"function": {}}]', "Tools[0].function.name"),
        ('[{"function": {"name": ""}}]', "Tools[0].function.name"),
        ('[{"function": {"name": ["x"]}}]', "Tools[0].function.name"),
        ('[{"function": {"name": "x", "parameters": "{}"}}]', "Tools[0].function.parameters"),
        ('[{"function": {"name": "x", "parameters": [1]}}]', "Tools[0].function.parameters"),
    ],
)
def test_tools_that_cannot_be_used(text: str, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_tools(text)
    assert caught.value.field == field


# Each meaning in each of the shapes that endpoints send.
SHAPES: list[tuple[Any, str | dict[str, Any]]] = [
    ("auto", "auto"),
    ("none", "none"),
    ("required", "required"),
    ("any", "required"),
    ({"type": "auto"}, "auto"),
    ({"type": "none"}, "none"),
    ({"type": "any"}, "required"),
    ({"type": "required"}, "required"),
    ({"type": "function", "function": {"name": "clock"}}, NAMED),
    ({"type": "function", "name": "clock"}, NAMED),
    ({"type": "tool", "name": "clock"}, NAMED),
    ({"function": {"name": "clock"}}, NAMED),
    ({"name": "clock"}, NAMED),
    (None, "auto"),
]


def encodings(value: Any) -> list[str]:
    once = json.dumps(value)
    spaced = json.dumps(value, indent=1)
    bare = [value, f" {value}\n"] if isinstance(value, str) else []
    return [once, f" {once} ", spaced, json.dumps(once), json.dumps(spaced), *bare]


@pytest.mark.parametrize(
    ("text", "expected"),
    [(text, expected) for value, expected in SHAPES for text in encodings(value)] + [("", "auto"), (" ", "auto")],
)
def test_choice(text: str, expected: str | dict[str, Any]) -> None:
    assert openai_tool_choice(text, TOOLS) == (expected, True)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", False)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", False)),
        ({"type": "tool", "name": "clock", "disable_parallel_tool_use": True}, (NAMED, False)),
        ({"type": "auto", "disable_parallel_tool_use": False}, ("auto", True)),
        ({"type": "auto", "disable_parallel_tool_use": None}, ("auto", True)),
    ],
)
def test_anthropic_wants_one_call_at_a_time(choice: Any, expected: tuple[Any, bool]) -> None:
    assert openai_tool_choice(json.dumps(choice), TOOLS) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("Auto", "always", "nope", "n", "function", "clock", '"clock"', '"always"', "5", "true", "[]", '["auto"]'),
        *("{", "{}", '{"type": "function"}', '{"type": "tool"}', '{"type": 5}', '{"name": 5}', '{"name": ""}', '"'),
        *('{"type": ["auto"]}', '{"type": {"auto": 1}}', '{"type": null}', '{"type": "any", "name": [1]}'),
        *('{"type": "none", "name": "clock"}', '{"type": "auto", "name": "clock"}', '{"type": "odd", "name": "clock"}'),
        *('{"function": "clock"}', '{"type": "function", "function": {"name": {}}}', json.dumps(json.dumps('"x"'))),
        pytest.param("[" * 100_000, id="deep list"),
        pytest.param('{"a":' * 100_000, id="deep object"),
        pytest.param("x" * 100_000, id="long"),
        pytest.param(json.dumps({"type": "x" * 100_000}), id="long object"),
    ],
)
def test_a_choice_that_cannot_be_used(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_tool_choice(text, TOOLS)
    assert caught.value.field == "ToolChoice"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["nope", "Auto", '"always"', '{"type": "function"}', "5", "{}"])
def test_an_unknown_choice_says_what_is_allowed(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        openai_tool_choice(text, TOOLS)
    assert text in str(caught.value)
    assert all(word in str(caught.value) for word in ("auto", "none", "required", "function"))


@pytest.mark.parametrize(("tools", "listed"), [(TOOLS, "get_weather, clock"), ([], "none")])
def test_a_function_that_is_not_there(tools: list[dict[str, Any]], listed: str) -> None:
    with pytest.raises(InvalidRequest, match="'sing'") as caught:
        openai_tool_choice('{"name": "sing"}', tools)
    assert listed in str(caught.value)


HOSTILE = st.recursive(
    st.sampled_from(["auto", "any", "none", "clock", "function", "", "\0", None, True, 5, 1.5]) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "name", "function", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(HOSTILE, st.integers(0, 3))
def test_any_json_is_understood_or_refused(value: Any, depth: int) -> None:
    text = value if depth == 0 and isinstance(value, str) else json.dumps(value)
    for _ in range(1, depth):
        text = json.dumps(text)
    choice = outcome(lambda: openai_tool_choice(text, TOOLS)[0])
    named = [{"type": "function", "function": {"name": name}} for name in ("get_weather", "clock")]
    assert choice in ("auto", "none", "required", *named, "refused: ToolChoice")


@given(HOSTILE)
def test_any_tools_are_understood_or_refused(value: Any) -> None:
    tools = outcome(lambda: openai_tools(json.dumps(value)))
    assert str(tools).startswith("refused: Tools") or all(tool["function"]["name"] for tool in tools)


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except InvalidRequest as error:
        return f"refused: {error.field}"
