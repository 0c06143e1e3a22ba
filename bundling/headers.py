"""The headers that a source can reach, whatever conditions stand around its `#include`s."""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include(?:_next)?[ \t]*[<"]([^<>"\n]+)[>"]', re.MULTILINE)
# In a generator it stands in a string, or braces stand in it.
_GENERATED = re.compile(r'#[ \t]*include[ \t]*[<"]([^<>"{}\n]+)[>"]')


def named_in(folder: Path) -> set[str]:
    """What the generators of C++ below the folder, which are written in Python, write after `#include`."""
    return {name for path in folder.rglob("*.py") for name in _GENERATED.findall(_text(path))}


def reachable(names: Iterable[str], search: Sequence[Path]) -> set[Path]:
    """Every header that these names lead to, as found in the folders.

    No condition is evaluated and every folder counts, so this is at least what any compilation opens. A name that no
    folder has is that of another platform.
    """
    found: set[Path] = set()
    todo: deque[tuple[str, Path | None]] = deque((name, None) for name in names)
    asked: set[tuple[str, Path | None]] = set()
    while todo:
        name, beside = todo.popleft()
        for folder in ([beside] if beside else []) + list(search):
            path = folder / name
            if path not in found and path.is_file():
                found.add(path)
                for inner in _INCLUDE.findall(_text(path)):
                    if (inner, path.parent) not in asked:
                        asked.add((inner, path.parent))
                        todo.append((inner, path.parent))
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
