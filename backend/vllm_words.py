"""The words of `run.sh worker` that are for `vllm serve`: how they come here, and what vLLM reads in them."""

import re
from collections.abc import Sequence

# Names of vLLM's own that others, which are read here, begin with.
_WHOLE = frozenset({"--data-parallel-size"})


def joined(argv: Sequence[str]) -> list[str]:
    """Flags and their values in one piece, for a word of vLLM's looks like a flag, as does each behind `--`."""
    joined: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            joined += [f"--vllm-arg={rest}" for rest in words]
        elif word == "--vllm-arg" and (value := next(words, None)) is not None:
            joined.append(f"{word}={value}")
        else:
            joined.append("--headless=true" if word == "--headless" else word)
    return joined


def option(words: Sequence[str], flag: str, short: str | None = None) -> str | None:
    """The value that vLLM's parser, which is argparse, sees of an option: the last one given, however it is spelled."""
    value = None
    for position, word in enumerate(words):
        name, equals, behind = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            # A name may be cut short, as long as it is not another's whole one.
            found = name == flag or (flag.startswith(name) and len(name) > 2 and name not in _WHOLE)
        else:
            found = name == short
        if found:
            value = behind if equals else next(iter(words[position + 1 :]), None)
        elif short is not None and len(short) == 2 and word.startswith(short):
            value = word[2:]
    return value


def split(text: str) -> list[str]:
    """Separated by commas, as the orchestrator has it; a comma of a word's own stands behind a backslash."""
    return [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r"(?:\\.|[^,\\])+", text)]
