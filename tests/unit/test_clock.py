"""A request's times, where the engine keeps none."""

import time
from types import SimpleNamespace

import pytest

from common.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Each look at it is a second later."""
    seconds = iter(range(1, 100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    clock = Clock()
    clock.start(7)
    return clock


def test_of_a_stream(clock: Clock) -> None:
    for tokens in (1, 2, 1):
        clock.tick(tokens)
    assert clock.times(None) == (1000, 2000)


def test_an_answer_in_one_piece_does_not_tell(clock: Clock) -> None:
    clock.tick(5)
    assert clock.times(None) == (0, 0)


def test_one_token_is_all_prefill(clock: Clock) -> None:
    clock.tick(1)
    assert clock.times(None) == (1000, 0)


def test_the_engine_knows_better(clock: Clock) -> None:
    clock.tick(5)
    assert clock.times(SimpleNamespace(scheduled_ts=2.0, first_token_ts=2.5, last_token_ts=4.0)) == (500, 1500)
