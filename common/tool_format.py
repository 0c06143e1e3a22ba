"""How a model writes tool calls, read off what its chat template makes of calls that are known.

A template that shows a call of the past shows the form that the model was trained to write. The same chat is rendered
with text, with one call and with two in its place; what stands between the known parts are the markers.
"""

import json
from collections.abc import Callable
from typing import Any

TEXT = "probe answer"

FIRST: dict[str, Any] = {"probe_one": "first value", "probe_two": "second value"}
SECOND: dict[str, Any] = {"probe_one": "third value", "probe_two": "fourth value"}
# (id, name, arguments); Mistral's templates take ids of nine characters alone.
CALLS = (("callprob1", "probe_first", FIRST), ("callprob2", "probe_second", SECOND))


def conversation(calls: int) -> list[dict[str, Any]]:
    """A chat whose last message, the assistant's, has so many of the `CALLS`, or the `TEXT` for none."""
    answer: dict[str, Any] = {"role": "assistant", "content": "" if calls else TEXT}
    if calls:
        answer["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for call_id, name, arguments in CALLS[:calls]
        ]
    return [{"role": "user", "content": "Hi"}, answer]


def tool_format(text: str, one: str, two: str) -> dict[str, Any]:
    """The fields of `ToolFormatMarkers` that say how calls are written; empty where the template shows no call.

    `text`, `one` and `two` are what it makes of `conversation` with no call, one and two; `two` is empty for a template
    that takes no two calls in a message.
    """
    header, _, footer = text.rpartition(TEXT)
    body = one[_alike(header, one) : len(one) - _alike(footer[::-1], one[::-1])]
    _, name, arguments = CALLS[0]
    if name not in body:
        return {}
    native = _json_object(body, 0, lambda value: name in json.dumps(value))
    if native is not None and arguments_in(native[2]):
        start, end, call = native
        second = _json_object(two, 0, lambda value: CALLS[1][1] in json.dumps(value))
        following = -1 if second is None else second[0]
        found = _around(body[:start], body[end:], two, _end_of(two, body[start:end]), following)
        return {"format_type": "json_native"} | _unwrapped(found) | _keys(call)
    at = body.index(name)
    behind = at + len(name)
    whole = _json_object(body, behind, lambda value: value == arguments)
    if whole is not None:
        start, end, _ = whole
        inside = {"func_name_suffix": body[behind:start]}
        kind = "tag_with_json"
    else:
        parts = _tagged(body, behind)
        if parts is None:
            return {}
        end, inside = parts
        kind = "tag_with_tagged"
    found = _around(body[:at], body[end:], two, _end_of(two, body[at:end]), two.find(CALLS[1][1]))
    found["func_name_prefix"] = found.pop("per_call_start")
    found["func_close"] = found.pop("per_call_end").removeprefix(inside.get("arg_value_suffix", ""))
    return {"format_type": kind} | found | inside


def arguments_in(call: Any) -> bool:
    """Whether a JSON value has the first call's arguments somewhere, as an object or as its text."""
    if call == FIRST or (isinstance(call, str) and _decoded(call) == FIRST):
        return True
    inner = call.values() if isinstance(call, dict) else call if isinstance(call, list) else ()
    return any(arguments_in(value) for value in inner)


def _tagged(body: str, behind: int) -> tuple[int, dict[str, str]] | None:
    """Where the last argument's value ends, and the markers of arguments that have tags each; None: there are none."""
    places = []
    at = behind
    for text in (text for item in FIRST.items() for text in item):
        at = body.find(text, at)
        if at < 0:
            return None
        places.append((at, at := at + len(text)))
    (name, name_end), (value, value_end), (other, _), (_, end) = places
    between = body[value_end:other]
    prefix = _marker(between, body[behind:name])
    return end, {
        "func_name_suffix": body[behind : name - len(prefix)],
        "arg_name_prefix": prefix,
        "arg_name_suffix": body[name_end:value],
        "arg_value_suffix": between[: len(between) - len(prefix)],
    }


def _around(before: str, after: str, two: str, end: int, following: int) -> dict[str, str]:
    """What stands before and behind each call, and before and behind all of them."""
    if end < 0 or following < end:
        return {"per_call_start": before, "per_call_end": after}
    between = two[end:following]
    start = _marker(between, before)
    close = after[: _alike(between[: len(between) - len(start)], after)]
    return {
        "section_start": before[: len(before) - len(start)],
        "per_call_start": start,
        "per_call_end": close,
        "section_end": after[len(close) :],
    }


def _unwrapped(found: dict[str, Any]) -> dict[str, Any]:
    """Without the brackets of a JSON array around all calls, which has a field of its own."""
    opening, closing = (
        ("section_start", "section_end") if "section_start" in found else ("per_call_start", "per_call_end")
    )
    start, end = found[opening].rstrip(), found[closing].lstrip()
    if start.endswith("[") and end.startswith("]"):
        return found | {opening: start[:-1], closing: end[1:], "tools_array_wrapped": True}
    return found


def _keys(call: dict[str, Any]) -> dict[str, Any]:
    """The JSON keys of a call's parts."""
    call_id, name, _ = CALLS[0]
    found: dict[str, Any] = {"id_field": next((key for key, value in call.items() if value == call_id), "")}
    inner = call
    for key, value in call.items():
        if isinstance(value, dict) and name in value.values() and arguments_in(value):
            found["function_field"], inner = key, value
    found["name_field"] = next((key for key, value in inner.items() if value == name), "")
    found["args_field"] = next((key for key, value in inner.items() if key != name and arguments_in(value)), "")
    found["fun_name_is_key"] = name in inner
    found["parameter_order"] = [] if name in inner else list(inner)
    return found


def _json_object(text: str, begin: int, wanted: Callable[[Any], bool]) -> tuple[int, int, Any] | None:
    """(start, end, value) of the first JSON object at or behind `begin` that is `wanted`."""
    start = text.find("{", begin)
    while start >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            value, end = None, start
        if value is not None and wanted(value):
            return start, end, value
        start = text.find("{", start + 1)
    return None


def _end_of(two: str, call: str) -> int:
    at = two.find(call)
    return -1 if at < 0 else at + len(call)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _marker(left: str, right: str) -> str:
    """What both end with, but for a bracket that closes something before it."""
    common = left[len(left) - _alike(left[::-1], right[::-1]) :]
    return common.removeprefix(">")


def _alike(left: str, right: str) -> int:
    """How many characters both begin with."""
    shorter = min(len(left), len(right))
    return next((place for place in range(shorter) if left[place] != right[place]), shorter)
