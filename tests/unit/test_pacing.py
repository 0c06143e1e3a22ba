"""How often answers are parsed whose parsing is costly."""

import pytest

from common import pacing
from common.pacing import COSTLY_SECONDS, MOST_SECONDS, SHARE, Pace, Paced


class Clock:
    now = 100.0

    def parse(self, answer: Paced, seconds: float) -> float:
        """Seconds from the begin of this piece to when the next one is due; 0: at once."""
        began = self.now
        self.now += seconds
        due = answer.due(began)
        return due and due - began


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pacing, "now", lambda: clock.now)
    return clock


def test_what_costs_little_is_never_late(clock: Clock) -> None:
    pace = Pace()
    with pace.answer() as answer:
        assert [clock.parse(answer, COSTLY_SECONDS / 2) for _ in range(5)] == [0] * 5
    assert pace.round_seconds == 0


def test_one_that_was_interrupted_once_is_not_costly(clock: Clock) -> None:
    with Pace().answer() as answer:
        assert [clock.parse(answer, seconds) for seconds in (0.02, 0.0001, 0.02, 0.0001)] == [0] * 4


def test_one_that_is_costly_leaves_the_loop_a_part_of_its_time(clock: Clock) -> None:
    with Pace().answer() as answer:
        clock.parse(answer, 0.004)
        assert clock.parse(answer, 0.004) == pytest.approx(0.004 / SHARE)
        assert clock.parse(answer, 0.006) == pytest.approx(0.004 / SHARE)
        assert clock.parse(answer, 0.006) == pytest.approx(0.006 / SHARE)


def test_many_leave_it_the_same_part_together(clock: Clock) -> None:
    pace = Pace()
    with pace.answer() as one, pace.answer() as other, pace.answer() as cheap:
        for _ in range(2):
            clock.parse(one, 0.002)
            clock.parse(other, 0.006)
            assert clock.parse(cheap, 0.0001) == 0
        assert clock.parse(one, 0.002) == clock.parse(other, 0.006) == pytest.approx(0.008 / SHARE)


def test_none_is_taken_less_often_than_twenty_times_a_second(clock: Clock) -> None:
    pace = Pace()
    answers = [pace.answer() for _ in range(100)]
    waits = [clock.parse(answer, 0.01) for _ in range(2) for answer in answers]
    assert max(waits) == pytest.approx(MOST_SECONDS)
    assert MOST_SECONDS < 1 / 20


def test_who_ends_or_becomes_cheap_is_no_longer_counted(clock: Clock) -> None:
    pace = Pace()
    with pace.answer() as cheaper:
        with pace.answer() as ended:
            for answer in (ended, ended, cheaper, cheaper):
                clock.parse(answer, 0.004)
            assert pace.round_seconds == pytest.approx(0.008)
        assert pace.round_seconds == pytest.approx(0.004)
        assert clock.parse(cheaper, 0.0001) == 0
        assert pace.round_seconds == pytest.approx(0)
