"""vLLM's model of a chat request, which looks at 80 fields: settings that it has checked before are not checked again.

An orchestrator sends the same with each chat. To check them takes an idle server, whose caches are cold, a quarter of a
millisecond, and 20 µs at other times.
"""

import copy
import functools
from collections.abc import Mapping
from types import NoneType
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

_MOST_KNOWN = 16
_MOST_VARIABLES = 32
_LONGEST = 64
_PLAIN = frozenset({bool, int, float, str, NoneType})
# Those of messages that are the same when they are checked: text, from one of these.
_KEYS = {"role", "content"}
_ROLES = frozenset({"system", "developer", "user", "assistant"})
_VARIABLES = "chat_template_kwargs"
# What is new each time.
_OF_EACH = frozenset({"messages", "request_id"})

# Name, type and value: for Python, 1 is True.
Setting = tuple[str, type, Any]


def chat_request(**fields: Any) -> ChatCompletionRequest:
    """`ChatCompletionRequest(**fields)`, which then has the `messages` themselves; they are a list of dictionaries.

    Raises:
        pydantic.ValidationError, VLLMValidationError: as that.

    """
    settings = _settings(fields)
    if settings is None:
        return ChatCompletionRequest(**fields)
    known, changeable = _known(settings)
    request = known.model_copy()
    # Not by attribute, which would look at each name; and with lists of its own, as a request that is made anew.
    request.__dict__.update({name: copy.copy(value) for name, value in changeable.items()})
    request.__dict__.update({name: fields[name] for name in _OF_EACH})
    return request


@functools.lru_cache(_MOST_KNOWN)
def _known(settings: tuple[Setting, ...]) -> tuple[ChatCompletionRequest, dict[str, Any]]:
    """A request with these settings, and those of its fields that could be changed in place."""
    fields = {name: value for name, _, value in settings}
    if _VARIABLES in fields:
        fields[_VARIABLES] = {name: value for name, _, value in fields[_VARIABLES]}
    request = ChatCompletionRequest(**fields, messages=[{"role": "user", "content": ""}], request_id="")
    return request, {
        name: value for name, value in vars(request).items() if type(value) not in _PLAIN and name not in _OF_EACH
    }


def _settings(fields: Mapping[str, Any]) -> tuple[Setting, ...] | None:
    """All but what is new each time; None where they are not as plain, or as few, as most."""
    if not (fields.keys() >= _OF_EACH and all(map(_is_plain, fields["messages"]))):
        return None
    found = []
    for name, value in fields.items():
        if name in _OF_EACH:
            continue
        if name == _VARIABLES:
            if len(value) > _MOST_VARIABLES:
                return None
            value = tuple((variable, type(its), its) for variable, its in value.items())  # noqa: PLW2901  # as a key
            if not all(_may_be_known(*each) for each in value):
                return None
        elif not _may_be_known(name, type(value), value):
            return None
        found.append((name, type(value), value))
    return tuple(found)


def _may_be_known(name: str, kind: type, value: Any) -> bool:
    return kind in _PLAIN and len(name) <= _LONGEST and (kind is not str or len(value) <= _LONGEST)


def _is_plain(message: Mapping[str, Any]) -> bool:
    return message.keys() == _KEYS and message["role"] in _ROLES and type(message["content"]) is str
