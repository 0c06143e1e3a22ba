"""What a request's `Metadata` says, key by key."""

import inspect
from typing import Any

from transformers import PythonBackend

from common.errors import InvalidRequest
from common.json_values import parse_json
from common.pb import backend_pb2 as pb

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Pins a request to a data-parallel rank.
RANK = "data_parallel_rank"
_MOST_DIGITS = 9
# Arguments of the template renderer itself, which a request must not reach.
_RESERVED_TEMPLATE_KWARGS = frozenset(
    {"chat_template", "tokenize", "messages", "tools", "self", "model_config", "tokenizer", "conversation"}
    | inspect.signature(PythonBackend.apply_chat_template).parameters.keys() - {"documents"}  # a variable of templates
)


def switch(options: pb.PredictOptions, key: str) -> bool | None:
    """What `Metadata` says under `key`; None where it says nothing.

    Raises:
        InvalidRequest: neither true nor false.

    """
    value = options.Metadata.get(key, "")
    if value not in ("", "true", "false"):
        raise InvalidRequest(f'Metadata["{key}"]', f"{value[:80]!r} is unknown; use true or false")
    return value == "true" if value else None


def one_of(options: pb.PredictOptions, key: str, *allowed: str) -> str | None:
    """The word that stands under `key`; None where none does.

    Raises:
        InvalidRequest: none of those `allowed`.

    """
    value = options.Metadata.get(key) or None
    if value not in (None, *allowed):
        raise InvalidRequest(
            f'Metadata["{key}"]', f"{str(value)[:80]!r} is unknown; use {', '.join(allowed[:-1])} or {allowed[-1]}"
        )
    return value


def whole_number(options: pb.PredictOptions, key: str) -> int | None:
    """The number that stands under `key`; None where none does.

    Raises:
        InvalidRequest: it is no whole number.

    """
    text = options.Metadata.get(key, "")
    try:
        return int(text) if text else None
    except ValueError:
        raise InvalidRequest(f'Metadata["{key}"]', f"{text[:20]!r} is not a whole number") from None


def template_kwargs(options: pb.PredictOptions) -> dict[str, Any]:
    """The variables of the chat template that `Metadata` sets, none of them an argument of the renderer's own.

    Raises:
        InvalidRequest: not a JSON object, or a switch that is neither true nor false.

    """
    field = 'Metadata["chat_template_kwargs"]'
    text = options.Metadata.get("chat_template_kwargs", "")
    kwargs = parse_json(field, text) if text.strip() else {}
    if not isinstance(kwargs, dict):
        raise InvalidRequest(field, "must be a JSON object")
    kwargs = {name: value for name, value in kwargs.items() if name not in _RESERVED_TEMPLATE_KWARGS}
    thinking = switch(options, "enable_thinking")
    if thinking is not None:
        kwargs["enable_thinking"] = thinking
        # What DeepSeek, Granite and others call it; a template that knows no such variable is not given it.
        kwargs.setdefault("thinking", thinking)
    return kwargs


def reasoning_effort(options: pb.PredictOptions) -> str | None:
    """How much a model is to think before it answers; None where nothing is said.

    Raises:
        InvalidRequest: none of `REASONING_EFFORTS`.

    """
    return one_of(options, "reasoning_effort", *REASONING_EFFORTS)


def rank(options: pb.PredictOptions, ranks: int) -> int | None:
    """The data-parallel rank, of so many, that is to answer; None: the one with the least to do.

    Raises:
        InvalidRequest: no number of a rank.

    """
    text = options.Metadata.get(RANK, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS and int(text) < ranks):
        raise InvalidRequest(
            f'Metadata["{RANK}"]',
            f"{text[:20]!r} is no rank of this engine; use 0 to {ranks - 1}, or leave it out for the least busy one",
        )
    return int(text)
