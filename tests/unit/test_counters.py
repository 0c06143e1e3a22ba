"""What is counted of RPCs and of requests on their way."""

import time

import pytest

from backend.counters import Counters, Histogram, Request, Stream


def test_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((0.1, 1))
    for seconds in (0.0, 0.1, 0.11, 1, 1.1, 100):
        histogram.observe(seconds)
    assert histogram.counts == [2, 2, 2]
    assert histogram.sum == pytest.approx(102.31)


def test_rpcs() -> None:
    counters = Counters()
    for _ in range(3):
        counters.rpc_started("Predict")
    counters.rpc_finished("Predict", "OK", 0.2)
    counters.rpc_finished("Predict", "CANCELLED", 0.002)
    assert counters.started == {"Predict": 3}
    assert counters.finished == {("Predict", "OK"): 1, ("Predict", "CANCELLED"): 1}
    assert sum(counters.rpc_seconds["Predict"].counts) == 2
    assert counters.rpc_seconds["Predict"].sum == pytest.approx(0.202)


def test_a_stream() -> None:
    counters = Counters()
    stream = Stream(counters)
    time.sleep(0.05)
    stream.submitted(7)
    stream.output(0)  # a step of the prefill
    assert counters.completion_tokens == sum(counters.first_token.counts) == 0
    stream.output(1)
    time.sleep(0.1)
    stream.output(4)
    stream.output(0)
    stream.queued(0.5)
    assert (counters.prompt_tokens, counters.completion_tokens) == (7, 5)
    assert sum(counters.first_token.counts) == 1
    assert counters.first_token.sum >= 0.05
    # Four tokens came together: four gaps of a quarter each.
    assert sum(counters.inter_token.counts) == 4
    assert max(counters.inter_token.counts) == 4
    assert counters.inter_token.sum >= 0.1
    bucket = counters.inter_token.counts.index(4)
    assert counters.inter_token.bounds[bucket] >= counters.inter_token.sum / 4
    assert counters.queued.sum == 0.5


def test_a_whole_answer_has_no_times_between_tokens() -> None:
    counters = Counters()
    request = Request(counters)
    request.submitted(7)
    request.output(5)
    assert (counters.prompt_tokens, counters.completion_tokens) == (7, 5)
    assert sum(counters.first_token.counts) == sum(counters.inter_token.counts) == 0
