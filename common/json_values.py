"""JSON in a field of the wire: read within limits, and looked through."""

import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from common.errors import InvalidRequest

# Characters of a text: Python's parser keeps its lock until it is done.
MOST_JSON_TEXT = 2_000_000
# Of objects and arrays within each other; what vLLM allows in a JSON schema. Code that handles such values later, and
# chat templates, call themselves once or more per level.
MOST_DEPTH = 64


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


def contents(value: Any) -> Iterator[Any]:
    """A JSON value and all that is in it, the keys of its objects among them, in no order."""
    rest = [value]
    while rest:
        each = rest.pop()
        yield each
        if isinstance(each, dict):
            rest += each.keys()
            rest += each.values()
        elif isinstance(each, list | tuple):
            rest += each


def _too_deep(field: str) -> InvalidRequest:
    return InvalidRequest(field, f"is nested too deep; use at most {MOST_DEPTH} objects and arrays within each other")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    msg = f"{text} is not a number that can be used"
    raise ValueError(msg)
