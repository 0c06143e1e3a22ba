"""The numbers of several processes that serve one engine, as one: what one scrape tells of all of them.

Imports `prometheus_client`: only where a metrics port is asked for.
"""

import dataclasses
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import Metric

from backend.counters import Counters, Histogram

_VLLM = "vllm:"
_SUMMED = ("counter", "histogram", "summary")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Of one process.

    Attributes:
        counters: ours.
        vllm: vLLM's metrics, which each client of an engine keeps for its own requests.
        scheduled_at: see `EngineStatistics.scheduled_at`.

    """

    counters: Counters
    vllm: list[Metric]
    scheduled_at: Mapping[int, float]


def snapshot(counters: Counters, scheduled_at: Mapping[int, float]) -> Snapshot:
    """Of this process."""
    return Snapshot(counters, [metric for metric in REGISTRY.collect() if metric.name.startswith(_VLLM)], scheduled_at)


def collected(scheduled_at: Mapping[int, float], others: Sequence[Snapshot]) -> Iterator[Metric]:
    """What `REGISTRY` has, vLLM's metrics together with those of other processes.

    Counters and histograms are summed. Of gauges, which are of a rank's scheduler, those hold that were written last:
    it tells one of its clients after each step, this one at `scheduled_at`.
    """
    own = list(REGISTRY.collect())
    yield from (metric for metric in own if not metric.name.startswith(_VLLM))
    mine = [metric for metric in own if metric.name.startswith(_VLLM)]
    if not mine:  # the engine is gone, and a frontend may not have heard of it yet
        return
    clients = [(scheduled_at, mine), *((each.scheduled_at, each.vllm) for each in others)]
    yield from merged(clients)


def merged(clients: Sequence[tuple[Mapping[int, float], Iterable[Metric]]]) -> list[Metric]:
    """The metrics of all, each with when it heard of which rank, in the order of the first that has them."""
    found: dict[str, list[tuple[Mapping[int, float], Metric]]] = {}
    for scheduled_at, metrics in clients:
        for metric in metrics:
            found.setdefault(metric.name, []).append((scheduled_at, metric))
    return [
        _summed([metric for _, metric in each]) if each[0][1].type in _SUMMED else _latest(each)
        for each in found.values()
    ]


def total(counters: Sequence[Counters]) -> Counters:
    """The sum of all of them, in a new object."""
    found = Counters()
    for each in counters:
        # As `metrics` reads them: ends before starts.
        for method, histogram in dict(each.rpc_seconds).items():
            _add(found.rpc_seconds.setdefault(method, Histogram(histogram.bounds)), histogram)
        found.finished.update(dict(each.finished))
        found.started.update(dict(each.started))
        for name in ("first_token", "inter_token", "queued"):
            _add(getattr(found, name), getattr(each, name))
        found.prompt_tokens += each.prompt_tokens
        found.completion_tokens += each.completion_tokens
    return found


def read(pickled: Iterable[bytes]) -> list[Snapshot]:
    """Those that `snapshot` has made in processes of ours."""
    return [pickle.loads(data) for data in pickled]  # noqa: S301  # see above


def _add(into: Histogram, histogram: Histogram) -> None:
    into.counts = [mine + its for mine, its in zip(into.counts, histogram.counts, strict=True)]
    into.sum += histogram.sum


def _latest(metrics: Sequence[tuple[Mapping[int, float], Metric]]) -> Metric:
    """Each sample as whoever has heard of its rank last has it."""
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], tuple[float, Any]] = {}
    for scheduled_at, metric in metrics:
        for sample in metric.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            at = scheduled_at.get(int(sample.labels.get("engine", "0")), 0.0)
            if key not in samples or at > samples[key][0]:
                samples[key] = (at, sample)
    first = metrics[0][1]
    whole = Metric(first.name, first.documentation, first.type, first.unit)
    whole.samples = [sample for _, sample in samples.values()]
    return whole


def _summed(metrics: Sequence[Metric]) -> Metric:
    first = metrics[0]
    values: dict[tuple[str, tuple[tuple[str, str], ...]], Any] = {}
    for metric in metrics:
        for sample in metric.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            before = values.get(key)
            # When something began to be counted is no number to add up.
            if before is None or sample.name.endswith("_created"):
                values.setdefault(key, sample)
            else:
                values[key] = before._replace(value=before.value + sample.value)
    whole = Metric(first.name, first.documentation, first.type, first.unit)
    whole.samples = list(values.values())
    return whole
