"""How problems are put into words for a caller."""

import difflib
from collections.abc import Iterable

import pydantic

_GIB, _MIB = 1024**3, 1024**2
# What is longer is like no name, and would be compared for seconds.
_LONG_NAME = 100


def first_problem(error: Exception) -> str:
    """What an exception says, without pydantic's framing and in one line."""
    if isinstance(error, pydantic.ValidationError):
        return str(error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"])
    return " ".join(str(error).split()) or type(error).__name__


def closest(name: str, valid: Iterable[str]) -> str:
    """A hint to append: the nearest of the `valid` names, or all of them where they are few."""
    names = list(valid)
    close = difflib.get_close_matches(name[:_LONG_NAME], names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; use one of {', '.join(names)}" if len(names) < 10 else ""


def in_bytes(size: int) -> str:
    """A number of bytes: `1.5 GiB`, `2.3 MiB`."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"
