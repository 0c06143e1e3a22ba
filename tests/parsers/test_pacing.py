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
    """A clock, how many pieces were parsed, and when the last one was."""

    def __init__(self, seconds_of_a_piece: float, seconds_of_a_token: float) -> None:
        self.now = 0.0
        self.pieces = 0
        self.parsed = 0.0
        self._of_a_piece = seconds_of_a_piece
        self._of_a_token = seconds_of_a_token

    def counted(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Parsers that take so long."""

        def made(*args: Any) -> Any:
            parser = make(*args)
            parse = parser.parse_delta

            def parse_delta(text: str, token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
                if token_ids:
                    self.pieces += 1
                    self.now += self._of_a_piece + len(token_ids) * self._of_a_token
                self.parsed = self.now
                return parse(text, token_ids, *args, **kwargs)

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


def recited(monkeypatch: pytest.MonkeyPatch, tool: str, *seconds: float) -> tuple[Bench, Times, int]:
    """What is to answer, the clock that it goes by, and how many tokens it has."""
    (form,) = (form for form in FORMATS if tool in form.tool)
    assert form.calls
    bench = Bench(form, tool, None)
    length = bench.take_up(Case(raw=form.calls([CALL]), calls=(CALL,)))
    times = Times(*seconds)
    monkeypatch.setattr(pacing, "now", lambda: times.now)
    monkeypatch.setattr(generation, "asyncio", times)
    monkeypatch.setattr(bench.generator, "parser", times.counted(bench.generator.parser))
    return bench, times, length


def streamed(monkeypatch: pytest.MonkeyPatch, tool: str, *seconds: float) -> tuple[Outcome, Times, int]:
    """The answer, what it took, and how many tokens it had."""
    bench, times, length = recited(monkeypatch, tool, *seconds)
    return asyncio.run(bench.ours_streamed(times.splits())), times, length


@pytest.mark.parametrize(
    ("seconds_of_a_piece", "tokens_of_a_piece"),
    [(0.0001, 1), (0.0009, 2), (0.004, 8), (0.02, 40), (0.1, 140)],
)
def test_costly_pieces_are_fewer(
    monkeypatch: pytest.MonkeyPatch, seconds_of_a_piece: float, tokens_of_a_piece: float
) -> None:
    outcome, times, length = streamed(monkeypatch, "qwen3_coder", seconds_of_a_piece, 0)
    assert [name for name, _ in outcome.calls] == ["make_event"]
    assert "first line\\n" * 199 in outcome.calls[0][1]
    assert length / times.pieces == pytest.approx(tokens_of_a_piece, rel=0.25)


def test_pieces_that_cost_what_their_tokens_do_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, times, length = streamed(monkeypatch, "qwen3_coder", 0, 0.0009)
    assert outcome.calls
    assert length / times.pieces < 1.1
    assert times.now == pytest.approx(length * TOKEN_SECONDS, abs=0.005)


def test_messages_and_the_end_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, times, _ = recited(monkeypatch, "qwen3_coder", 0.004, 0)
    bench.reciter.splits = times.splits()

    async def late() -> list[float]:
        seconds = [times.now - times.parsed async for _ in bench.run(stream=True).deltas()]
        return [*seconds, times.now - times.parsed]

    assert set(asyncio.run(late())) == {0.0}


def test_who_leaves_is_no_longer_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, times, _ = recited(monkeypatch, "qwen3_coder", 0.004, 0)
    bench.reciter.splits = times.splits()

    async def left_after(messages: int) -> tuple[float, float]:
        answer = bench.run(stream=True).deltas()
        for _ in range(messages):
            await anext(answer)
        counted = bench.generator.pace.round_seconds
        await answer.aclose()
        return counted, bench.generator.pace.round_seconds

    counted, left = asyncio.run(left_after(20))
    assert counted == pytest.approx(0.004)
    assert left == pytest.approx(0)


def test_answers_of_one_engine_share_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, times, length = recited(monkeypatch, "qwen3_coder", 0.004, 0)
    bench.generator.pace.round_seconds = 0.008  # of two others
    asyncio.run(bench.ours_streamed(times.splits()))
    assert length / times.pieces == pytest.approx(3 * 8, rel=0.25)


def test_who_reads_token_by_token_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, times, length = streamed(monkeypatch, "pythonic", 0.0009, 0)
    assert outcome.calls
    assert times.pieces >= length
    assert times.now == pytest.approx(length * TOKEN_SECONDS, abs=3 * TOKEN_SECONDS)
