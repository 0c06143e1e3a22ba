"""`Message`s of the wire -> OpenAI messages, as dictionaries that vLLM's chat utilities take."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any, NoReturn

from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb

# Of objects and arrays within each other; what vLLM allows in a JSON schema. Code that handles such values later, and
# chat templates, call themselves once or more per level.
MOST_DEPTH = 64
# vLLM's request model checks them in one piece, which no thread makes bearable: 0.2 s, and 3 s for 470,000.
MOST_MESSAGES = 20_000
# Of all messages together: it reads the arguments of each in the event loop.
MOST_CALLS = 20_000
# Characters of a JSON text in a field: Python's parser keeps its lock until it is done.
MOST_JSON_TEXT = 2_000_000
# And of all messages' calls, in which a character may take six: arguments are JSON in a string of JSON.
MOST_CALLS_TEXT = 8_000_000
logger = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def openai_messages(messages: Sequence[pb.Message]) -> list[dict[str, Any]]:
    """One dictionary per message, with only the keys that are set.

    Raises:
        InvalidRequest: too many, an unknown role, or tool calls that are too many or not what OpenAI's API defines.

    """
    if len(messages) > MOST_MESSAGES:
        raise InvalidRequest("Messages", f"has {len(messages)}; use at most {MOST_MESSAGES}")
    written = sum(len(message.tool_calls) for message in messages)
    if written > MOST_CALLS_TEXT:
        raise InvalidRequest("Messages", f"has {written} characters of tool calls; use at most {MOST_CALLS_TEXT}")
    openai = [_openai_message(f"Messages[{index}]", message) for index, message in enumerate(messages)]
    calls = sum(len(message.get("tool_calls", ())) for message in openai)
    if calls > MOST_CALLS:
        raise InvalidRequest("Messages", f"has {calls} tool calls; use at most {MOST_CALLS}")
    return openai


def _openai_message(where: str, message: pb.Message) -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidRequest(f"{where}.role", f"{message.role[:80]!r} is unknown; use one of {', '.join(ROLES)}")
    tool_calls = _tool_calls(f"{where}.tool_calls", message.tool_calls)
    openai: dict[str, Any] = {"role": message.role, "content": message.content}
    if tool_calls:
        if message.role != "assistant":
            raise InvalidRequest(f"{where}.tool_calls", f"belong to an assistant's message, not to a {message.role}'s")
        # OpenAI's null: an empty string would render as an answer before the calls.
        openai |= {"content": message.content or None, "tool_calls": tool_calls}
    for field in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, field):
            openai[field] = value
    return openai


def _tool_calls(where: str, text: str) -> list[dict[str, Any]]:
    if not text.strip():
        return []
    calls = parse_json(where, text, MOST_CALLS_TEXT)
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise InvalidRequest(where, "must be a JSON array of tool calls")
    return [_tool_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidRequest(where, 'must be {"id", "type": "function", "function": {"name", "arguments"}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _history_arguments(where, arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{where}.function.arguments", "must be a JSON object")
    return {
        "id": str(call.get("id") or ""),
        "type": "function",
        "function": {"name": function["name"], "arguments": json.dumps(arguments, ensure_ascii=False)},
    }


def _history_arguments(where: str, text: str) -> dict[str, Any]:
    """The arguments of a call in the history: none for one that a limit has cut, which would fail every later turn."""
    if not text.strip():
        return {}
    try:
        arguments = parse_json(where, text, MOST_CALLS_TEXT)
    except InvalidRequest:
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    logger.warning("%s.function.arguments: no JSON object (%d characters); taken for {}", where, len(text))
    return {}


def parse_json(field: str, text: str, most: int = MOST_JSON_TEXT) -> Any:
    """The value of a JSON text that stands in `field`.

    Raises:
        InvalidRequest: longer than `most` characters, not JSON, a number that no float holds, half a surrogate pair
            (which has no bytes), or nested deeper than `MOST_DEPTH`.

    """
    if len(text) > most:
        raise InvalidRequest(field, f"has {len(text)} characters; use at most {most}")
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        check_depth(field, value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _too_deep(field) from None
    except UnicodeEncodeError:
        raise InvalidRequest(field, "has half a surrogate pair, which is no character") from None
    except ValueError as error:
        raise InvalidRequest(field, f"not valid JSON: {error}") from None
    return value


def check_depth(field: str, value: Any) -> None:
    """Refuse a JSON value whose objects and arrays nest deeper than `MOST_DEPTH`.

    Raises:
        InvalidRequest: names `field`.

    """
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        containers = [each for each in level if isinstance(each, dict | list)]
        if not containers:
            return
        level = [each for one in containers for each in (one.values() if isinstance(one, dict) else one)]
    raise _too_deep(field)


def _too_deep(field: str) -> InvalidRequest:
    return InvalidRequest(field, f"is nested too deep; use at most {MOST_DEPTH} objects and arrays within each other")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    msg = f"{text} is not a number that can be used"
    raise ValueError(msg)
