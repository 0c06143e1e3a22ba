"""`Message`s of the wire -> OpenAI messages, as dictionaries that vLLM's chat utilities take."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from common.errors import InvalidRequest
from common.json_values import parse_json
from common.pb import backend_pb2 as pb

# vLLM's request model checks them in one piece, which no thread makes bearable: 0.2 s, and 3 s for 470,000.
MOST_MESSAGES = 20_000
# Of all messages together: it reads the arguments of each in the event loop.
MOST_CALLS = 20_000
# Characters of all messages' calls, in which one may take six: arguments are JSON in a string of JSON.
MOST_CALLS_TEXT = 8_000_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

logger = logging.getLogger(__name__)


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
