"""Every parser with every case of its format: what comes out in each way of feeding, by us and by vLLM's server."""

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.parsers.cases import Case, Format, both_cases, reasoning_cases, tool_cases
from tests.parsers.feed import Bench, Outcome
from tests.parsers.formats import FORMATS
from tests.parsers.judge import faults, same_but_for_white_space, same_place

KNOWN = Path(__file__).with_name("known.tsv")
TOOL_CASES = ("plain", "one", "two", "after text", "nested", "escapes", "cut", "thought, call", "thought, text, calls")
REASONING_CASES = ("plain", "no markers", "thought", "cut", "thought, call", "thought, text, calls")
MODES = ("whole", "once", "tokens", "splits")
RANDOM_SPLITS = 4
NEVER_SAID = ("<|never said|>",)
MOVED = "a stream and the whole answer don't agree on whether the text is reasoning"
WHITE_SPACE = "white space around the text differs from the whole answer's"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One parser and one case."""

    kind: str
    """tool or reasoning"""
    parser: str
    note: str
    case: str

    @property
    def row(self) -> str:
        """The parser, with what tells its formats apart."""
        return f"{self.parser} ({self.note})" if self.note else self.parser

    def __str__(self) -> str:
        return f"{self.kind} {self.row}: {self.case}"


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out of one cell.

    Attributes:
        faults: mode -> what is wrong; modes that are right are missing.
        differences: what vLLM's own server answered otherwise than we did.

    """

    case: Case
    faults: dict[str, str]
    differences: list[str]


def cells() -> dict[Cell, tuple[Format, str | None, str | None, Case]]:
    """All there is to try: its format, tool parser, reasoning parser and case."""
    found: dict[Cell, tuple[Format, str | None, str | None, Case]] = {}
    for form in FORMATS:
        partner_tool, partner_reasoning = form.partners
        pairs = both_cases(form) if form.calls and form.think and partner_tool and partner_reasoning else {}
        for parser in form.tool:
            for name, case in tool_cases(form).items():
                found[Cell("tool", parser, form.note, name)] = (form, parser, None, case)
            for name, case in pairs.items():
                found[Cell("tool", parser, form.note, name)] = (form, parser, partner_reasoning, case)
        for parser in form.reasoning:
            for name, case in reasoning_cases(form).items():
                found[Cell("reasoning", parser, form.note, name)] = (form, None, parser, case)
            for name, case in pairs.items():
                found[Cell("reasoning", parser, form.note, name)] = (form, partner_tool, parser, case)
    return found


CELLS = cells()


@cache
def result(cell: Cell) -> Result:
    """Try one cell in all modes."""
    form, tool, reasoning, case = CELLS[cell]
    with _quiet():
        return asyncio.run(_try(cell, _bench(form, tool, reasoning), case))


@cache
def _kept_bench(form: int, tool: str | None, reasoning: str | None) -> Bench:
    return Bench(FORMATS[form], tool, reasoning)


def _bench(form: Format, tool: str | None, reasoning: str | None) -> Bench:
    # Harmony's parser keeps in its class what the last one was made with: a process has one such model.
    kept = "harmony" not in form.tokenizer
    return _kept_bench(FORMATS.index(form), tool, reasoning) if kept else Bench(form, tool, reasoning)


async def _try(cell: Cell, bench: Bench, case: Case) -> Result:
    length = bench.take_up(case)
    found: dict[str, str] = {}
    differences: list[str] = []
    whole = await bench.ours_whole()
    _compare("whole", whole, await bench.theirs_whole(), differences)
    if fault := faults(case, whole):
        found["whole"] = fault
    for mode, splits in _splits(cell, length):
        streamed = await bench.ours_streamed(splits)
        # Parsers of the older kind get one token at a time from us, however the engine's output was split.
        theirs = await bench.theirs_streamed((1,) * length if bench.token_by_token else splits)
        _compare(f"{mode} {splits}", streamed, theirs, differences)
        fault = faults(case, streamed)
        if not fault and "whole" not in found and not same_place(whole, streamed):
            fault = MOVED
        elif not fault and "whole" not in found and same_but_for_white_space(whole, streamed):
            fault = WHITE_SPACE
        if fault and found.get(mode, WHITE_SPACE) == WHITE_SPACE:
            found[mode] = fault
    tokens = (1,) * length
    alone = await bench.ours_streamed(tokens)
    for splits in (tokens, (), *(splits for mode, splits in _splits(cell, length) if mode == "splits")):
        held_back = await bench.ours_streamed(splits, NEVER_SAID)
        if held_back != alone:
            differences.append(f"with stop strings, {splits}: {held_back} is not {alone}")
    return Result(case, found, differences)


def _compare(mode: str, ours: Outcome, theirs: Outcome, differences: list[str]) -> None:
    if ours != theirs and not (ours.halved and theirs.error):
        differences.append(f"{mode}: {ours} is not vLLM's {theirs}")


def _splits(cell: Cell, length: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "once", ()
    yield "tokens", (1,) * length
    rng = random.Random(str(cell))
    for _ in range(RANDOM_SPLITS):
        yield "splits", tuple(rng.randint(1, 12) for _ in range(length))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Parsers log their failures with tracebacks; here they are results."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@cache
def known() -> dict[tuple[str, str], str]:
    """(cell, mode) -> what vLLM is known to get wrong there."""
    rows = (line.split("\t") for line in KNOWN.read_text(encoding="utf-8").splitlines())
    return {(cell, mode): fault for cell, mode, fault in rows}


def write_known() -> None:
    """Take what is wrong now as known."""
    rows = (f"{cell}\t{mode}\t{fault}\n" for cell in CELLS for mode, fault in result(cell).faults.items())
    KNOWN.write_text("".join(rows), encoding="utf-8")
