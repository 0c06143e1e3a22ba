"""How often answers are parsed whose parsing is costly."""

import pytest

from common.pacing import COSTLY_SECONDS, MOST_SECONDS, MOST_VAIN, SHARE, Pace, Paced


def begin(answer: Paced, seconds: float) -> None:
    """Tokens that come one by one, and take so long."""
    for _ in range(2):
        answer.pause(seconds, 1)


def test_what_costs_little_is_never_kept_waiting() -> None:
    pace = Pace()
    with pace.answer() as answer:
        assert [answer.pause(COSTLY_SECONDS / 2, tokens) for tokens in (1, 1, 5, 100)] == [0] * 4
    assert pace.round_seconds == 0


def test_one_that_is_costly_leaves_the_loop_a_part_of_its_time() -> None:
    with Pace().answer() as answer:
        begin(answer, 0.004)
        assert answer.pause(0.004, 1) == pytest.approx(0.004 / SHARE - 0.004)
        assert answer.pause(0.004, 8) == pytest.approx(0.004 / SHARE - 0.004)


def test_a_character_of_two_tokens_costs_as_much_as_one_of_one() -> None:
    with Pace().answer() as answer:
        for _ in range(10):
            answer.pause(0, 1)
            assert answer.pause(0.008, 1) == pytest.approx(0)
            assert answer.pause(0, 1) == pytest.approx(0.004 / SHARE)


def test_many_leave_it_the_same_part_together() -> None:
    pace = Pace()
    with pace.answer() as one, pace.answer() as other, pace.answer() as cheap:
        begin(one, 0.002)
        begin(other, 0.006)
        begin(cheap, 0.0001)
        assert one.pause(0.002, 2) == pytest.approx(0.008 / SHARE - 0.002)
        assert other.pause(0.006, 2) == pytest.approx(0.008 / SHARE - 0.006)
        assert cheap.pause(0.0001, 1) == 0


def test_nobody_waits_longer_than_a_stream_may() -> None:
    pace = Pace()
    answers = [pace.answer() for _ in range(100)]
    for answer in answers:
        begin(answer, 0.01)
    assert {answer.pause(0.01, 2) for answer in answers} == {MOST_SECONDS}
    assert MOST_SECONDS < 1 / 20


def test_who_ends_or_becomes_cheap_is_no_longer_counted() -> None:
    pace = Pace()
    with pace.answer() as cheaper:
        with pace.answer() as ended:
            begin(ended, 0.004)
            begin(cheaper, 0.004)
            assert pace.round_seconds == pytest.approx(0.008)
        assert pace.round_seconds == pytest.approx(0.004)
        begin(cheaper, 0.0001)
        assert pace.round_seconds == pytest.approx(0)


def test_where_many_tokens_cost_as_much_as_one_by_one_nobody_waits() -> None:
    pace = Pace()
    with pace.answer() as answer:
        begin(answer, 0.002)
        waits = []
        for _ in range(1000):
            # It waits, has four tokens for it, which cost four times as much; then it has one at a time again.
            waits.append(answer.pause(0.008, 4))
            while answer.pause(0.002, 1) == 0:
                waits.append(0.0)
            waits.append(1.0)
        assert sum(waits) / len(waits) < 2 / MOST_VAIN
        assert waits[:10] == [0, 1, 0, 0, 1, 0, 0, 0, 0, 1]


def test_what_was_in_vain_is_tried_again() -> None:
    with Pace().answer() as answer:
        begin(answer, 0.002)
        assert answer.pause(0.016, 8) == 0
        begin(answer, 0.002)
        assert answer.pause(0.002, 8) > 0
        assert answer.pause(0.004, 16) > 0
