"""How several families write calls."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from tests.parsers.cases import Call, dumps

THINK = ("<think>", "</think>")
TOOL_CALL = ("<tool_call>", "</tool_call>")
NO_THINKING = {"enable_thinking": False}
THINKING = {"enable_thinking": True}


def text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else dumps(value)


def objects(
    calls: Sequence[Call], opened: str = "", closed: str = "", between: str = "", arguments: str = "arguments"
) -> str:
    """One JSON object per call between markers."""
    return between.join(opened + dumps({"name": name, arguments: given}) + closed for name, given in calls)


def array(calls: Sequence[Call], arguments: str = "arguments") -> str:
    """One JSON array of all calls."""
    return dumps([{"name": name, arguments: given} for name, given in calls])


def parameters(
    calls: Sequence[Call],
    *,
    call: str,
    end: str,
    parameter: str,
    parameter_end: str,
    between: str = "",
    value: Callable[[Any], str] = text,
) -> str:
    """XML-like calls: `call` holds {name}, `parameter` {key}."""
    return between.join(
        call.format(name=name)
        + "".join(parameter.format(key=key) + value(given) + parameter_end for key, given in arguments.items())
        + end
        for name, arguments in calls
    )


def functions(calls: Sequence[Call], opened: str, closed: str, newline: str = "\n") -> str:
    """Qwen3-Coder's calls between other outer markers."""
    return parameters(
        calls,
        call=f"{opened}\n<function={{name}}>\n",
        parameter=f"<parameter={{key}}>{newline}",
        parameter_end=f"{newline}</parameter>\n",
        end=f"</function>\n{closed}",
        between="\n",
    )


def pythonic(calls: Sequence[Call], between: str = ", ", value: Callable[[Any], str] = repr) -> str:
    """Calls of Python functions."""
    return between.join(
        f"{name}({', '.join(f'{key}={value(given)}' for key, given in arguments.items())})" for name, arguments in calls
    )


def python_or_json(value: Any) -> str:
    """A literal as OLMo 3 writes it: JSON's, which for strings is Python's too."""
    return json.dumps(value, ensure_ascii=False)
