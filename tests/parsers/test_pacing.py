"""Answers whose parsing is costly are read in fewer pieces, and read alike.

Time is told, not waited for: a piece takes as long to parse as the test says, and the engine makes a token in each
millisecond, of which vLLM joins those that nobody has taken.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common import generation, pacing
from tests.parsers.cases import Call, Case
from tests.parsers.feed import Bench, Outcome
from tests.parsers.formats import FORMATS

TOKEN_SECONDS = 0.001
CALL: Call = ("make_event", {"title": "first line\n" * 200})


class Times:
    """A clock, and how many pieces were parsed."""

    def __init__(self, parsing_seconds: float) -> None:
        self.now = 0.0
        self.pieces = 0
        self._parsing_seconds = parsing_seconds

    def counted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Parsers that take so long."""

        def made(*args: Any) -> Any:
            parser = make(*args)
            parse = parser.parse_delta

            def parse_delta(*args: Any, **kwargs: Any) -> Any:
                self.pieces += 1
                self.now += self._parsing_seconds
                return parse(*args, **kwargs)

            parser.parse_delta = parse_delta
            return parser

        return made

    def splits(self) -> Iterator[int]:
        """As many tokens as have been made since the last piece was taken."""
        taken = 0
        while True:
            self.now = max(self.now, (taken + 1) * TOKEN_SECONDS)
            ready = int(self.now / TOKEN_SECONDS + 1e-6) - taken
            taken += ready
            yield ready

    async def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0)
        await asyncio.sleep(0)


def streamed(monkeypatch: pytest.MonkeyPatch, tool: str, parsing_seconds: float) -> tuple[Outcome, Times, int]:
    """The answer, what it took, and how many tokens it had."""
    (form,) = (form for form in FORMATS if tool in form.tool)
    assert form.calls
    bench = Bench(form, tool, None)
    length = bench.take_up(Case(raw=form.calls([CALL]), calls=(CALL,)))
    times = Times(parsing_seconds)
    monkeypatch.setattr(pacing, "now", lambda: times.now)
    monkeypatch.setattr(generation, "asyncio", times)
    monkeypatch.setattr(bench.generator, "parser", times.counted(bench.generator.parser))
    return asyncio.run(bench.ours_streamed(times.splits())), times, length


@pytest.mark.parametrize(
    ("parsing_seconds", "tokens_of_a_piece"),
    [(0.0001, 1), (0.0009, 2), (0.004, 8), (0.02, pacing.MOST_SECONDS / TOKEN_SECONDS), (0.1, 100)],
)
def test_costly_pieces_are_fewer(
    monkeypatch: pytest.MonkeyPatch, parsing_seconds: float, tokens_of_a_piece: float
) -> None:
    outcome, times, length = streamed(monkeypatch, "qwen3_coder", parsing_seconds)
    assert [name for name, _ in outcome.calls] == ["make_event"]
    assert "first line\\n" * 199 in outcome.calls[0][1]
    assert length / times.pieces == pytest.approx(tokens_of_a_piece, rel=0.2)


def test_who_reads_token_by_token_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, times, length = streamed(monkeypatch, "pythonic", 0.0009)
    assert outcome.calls
    assert times.pieces >= length
    assert times.now == pytest.approx(length * TOKEN_SECONDS, abs=3 * TOKEN_SECONDS)
