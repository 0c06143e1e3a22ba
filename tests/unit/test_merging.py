"""The numbers of several processes as one."""

import pickle
from collections.abc import Iterator

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric

from backend import merging
from backend.counters import Counters


def numbers(requests: int, running: int, seconds: float) -> list[Metric]:
    """Metrics as vLLM's, of one process."""
    registry = CollectorRegistry()
    counter = Counter("vllm:requests", "Requests.", ["reason"], registry=registry)
    counter.labels("stop").inc(requests)
    if requests > 1:
        counter.labels("length").inc()
    Gauge("vllm:running", "Requests that run.", registry=registry).set(running)
    Histogram("vllm:wait", "Seconds.", buckets=(1, 2), registry=registry).observe(seconds)
    return list(registry.collect())


def values(metrics: list[Metric]) -> dict[tuple[str, str], float]:
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for metric in metrics
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_counters_and_histograms_are_summed_and_the_latest_gauge_holds() -> None:
    first, second = numbers(1, 5, 0.5), numbers(3, 7, 1.5)
    assert values(merging.merged([({0: 1.0}, first), ({0: 2.0}, second)])) == {
        ("vllm:requests_total", "stop"): 4,
        ("vllm:requests_total", "length"): 1,
        ("vllm:running", ""): 7,
        ("vllm:wait_bucket", "1.0"): 1,
        ("vllm:wait_bucket", "2.0"): 2,
        ("vllm:wait_bucket", "+Inf"): 2,
        ("vllm:wait_count", ""): 2,
        ("vllm:wait_sum", ""): 2.0,
    }
    assert values(merging.merged([({0: 2.0}, first), ({0: 1.0}, second)]))["vllm:running", ""] == 5
    # What was given is as it was.
    assert values(first)["vllm:requests_total", "stop"] == 1


def test_a_gauge_of_each_rank_is_of_who_heard_of_it_last() -> None:
    def running(*numbers: int) -> list[Metric]:
        registry = CollectorRegistry()
        gauge = Gauge("vllm:running", "Requests that run.", ["engine"], registry=registry)
        for rank, number in enumerate(numbers):
            gauge.labels(str(rank)).set(number)
        return list(registry.collect())

    clients = [({0: 11.0, 1: 9.0}, running(3, 2)), ({1: 10.0}, running(0, 1))]
    assert values(merging.merged(clients)) == {("vllm:running", "0"): 3, ("vllm:running", "1"): 1}


def counted(method: str, tokens: int) -> Counters:
    counters = Counters()
    counters.rpc_started(method)
    counters.rpc_finished(method, "OK", 0.2)
    counters.rpc_started("Health")
    counters.queued.observe(0.3)
    counters.prompt_tokens, counters.completion_tokens = 10 * tokens, tokens
    return counters


def test_our_counters_are_summed_over_processes() -> None:
    one, two = counted("Predict", 1), counted("Free", 2)
    whole = merging.total([one, two])
    assert whole.started == {"Predict": 1, "Free": 1, "Health": 2}
    assert whole.finished == {("Predict", "OK"): 1, ("Free", "OK"): 1}
    assert sum(whole.rpc_seconds["Predict"].counts) == 1
    assert sum(whole.queued.counts) == 2
    assert whole.queued.sum == pytest.approx(0.6)
    assert (whole.prompt_tokens, whole.completion_tokens) == (30, 3)
    assert sum(one.queued.counts) == 1


@pytest.fixture
def own_gauge() -> Iterator[Gauge]:
    gauge = Gauge("vllm:running", "Requests that run.")
    yield gauge
    REGISTRY.unregister(gauge)


def test_the_gauge_of_the_client_that_heard_of_the_scheduler_last(own_gauge: Gauge) -> None:
    own_gauge.set(1)
    others = [merging.Snapshot(Counters(), numbers(1, running, 1), {0: at}) for running, at in ((2, 20.0), (3, 10.0))]

    def running(scheduled_at: float) -> float:
        return values(list(merging.collected({0: scheduled_at}, others)))["vllm:running", ""]

    assert running(15.0) == 2
    assert running(25.0) == 1


def test_what_others_have_of_an_engine_that_is_gone_here_is_not_told() -> None:
    others = [merging.Snapshot(Counters(), numbers(1, 1, 1), {0: 1.0})]
    found = {metric.name for metric in merging.collected({0: 2.0}, others)}
    assert not [name for name in found if name.startswith("vllm:")]
    assert "process_cpu_seconds" in found


def test_a_snapshot_goes_through_a_pickle(own_gauge: Gauge) -> None:
    own_gauge.set(4)
    (found,) = merging.read([pickle.dumps(merging.snapshot(counted("Predict", 5), {0: 1.5}))])
    assert found.counters.completion_tokens == 5
    assert values(found.vllm) == {("vllm:running", ""): 4}
    assert found.scheduled_at == {0: 1.5}
