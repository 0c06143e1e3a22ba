"""Names, units and labels of what is counted, in Prometheus' format, and the HTTP server that answers with it.

Imports `prometheus_client`, which takes 20 ms with the HTTP server: only where a metrics port is asked for, and not
before the gRPC port is open.
"""

import itertools
import logging
import socket
import socketserver
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from backend import merging
from backend.counters import Counters, Histogram
from backend.lifecycle import State
from common.processes import memory_by_process

logger = logging.getLogger(__name__)

# A client that sends no request, or doesn't read its answer, holds a thread for so long.
_CLIENT_SECONDS = 30.0


class Loaded(Protocol):
    """What is asked of a `Lifecycle`."""

    @property
    def state(self) -> State:
        """What the process is doing."""

    @property
    def loaded_at(self) -> float | None:
        """`time.monotonic()` of the moment that the model was ready."""

    @property
    def scheduled_at(self) -> dict[int, float]:
        """As `EngineStatistics.scheduled_at`."""


class Ours:
    """A collector of everything with the prefix `backend_`."""

    def __init__(self, counters: Callable[[], Counters], lifecycle: Loaded) -> None:
        self._counters = counters
        self._lifecycle = lifecycle

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        counters = self._counters()
        yield from self._rpcs(counters)
        yield from self._requests(counters)
        yield from self._process()

    def _rpcs(self, counters: Counters) -> Iterator[Metric]:
        # Ends are read before starts, so that there are never more of them.
        seconds, ended = dict(counters.rpc_seconds), dict(counters.finished)
        begun = dict(counters.started)
        started = CounterMetricFamily("backend_rpcs_started", "RPCs that began.", labels=["method"])
        finished = CounterMetricFamily("backend_rpcs_finished", "RPCs that ended.", labels=["method", "code"])
        flying = GaugeMetricFamily("backend_rpcs_in_flight", "RPCs that have not ended.", labels=["method"])
        for method, number in begun.items():
            started.add_metric([method], number)
            flying.add_metric([method], number - sum(n for (name, _), n in ended.items() if name == method))
        for (method, code), number in ended.items():
            finished.add_metric([method, code], number)
        took = HistogramMetricFamily("backend_rpc_duration_seconds", "From begin to end of RPCs.", labels=["method"])
        for method, histogram in seconds.items():
            took.add_metric([method], *_buckets(histogram))
        yield from (started, finished, flying, took)

    def _requests(self, counters: Counters) -> Iterator[Metric]:
        yield _histogram(
            "backend_first_token_seconds", "From a stream's request to its first token.", counters.first_token
        )
        yield _histogram("backend_inter_token_seconds", "From one token of a stream to the next.", counters.inter_token)
        yield _histogram("backend_queue_seconds", "In the queue of the engine, before the prefill.", counters.queued)
        yield CounterMetricFamily("backend_prompt_tokens", "Tokens given to the engine.", counters.prompt_tokens)
        yield CounterMetricFamily(
            "backend_completion_tokens", "Tokens that the engine made.", counters.completion_tokens
        )

    def _process(self) -> Iterator[Metric]:
        state, loaded_at = self._lifecycle.state, self._lifecycle.loaded_at
        states = GaugeMetricFamily("backend_state", "1 for what the process is doing, else 0.", labels=["state"])
        for other in State:
            states.add_metric([other.value.replace(" ", "_")], other is state)
        yield states
        loaded = GaugeMetricFamily("backend_loaded_seconds", "Since the model was ready; absent without one.")
        if loaded_at is not None:
            loaded.add_metric([], time.monotonic() - loaded_at)
        yield loaded
        memory = GaugeMetricFamily(
            "backend_resident_memory_bytes", "Of the server and the engine's processes, by name.", labels=["process"]
        )
        for name, size in _by_name(memory_by_process()).items():
            memory.add_metric([name], size)
        yield memory


def registry(
    counters: Counters, lifecycle: Loaded, others: Callable[[], list[bytes]] | None = None
) -> CollectorRegistry:
    """Ours, and what the process-wide registry has: vLLM's `vllm:*`, and `process_*` and `python_*`.

    With `others`, ours and vLLM's are those of this process and of all whose pickled `merging.Snapshot` it gives.
    """
    everything = CollectorRegistry(support_collectors_without_names=True)
    if others is None:
        everything.register(Ours(lambda: counters, lifecycle))
        everything.register(REGISTRY)
    else:
        everything.register(_All(counters, lifecycle, others))
    return everything


class _All:
    """Asks the others once per scrape."""

    def __init__(self, counters: Counters, lifecycle: Loaded, others: Callable[[], list[bytes]]) -> None:
        self._counters = counters
        self._lifecycle = lifecycle
        self._others = others

    def collect(self) -> Iterator[Metric]:
        """See `prometheus_client.registry.Collector`."""
        others = merging.read(self._others())
        counters = merging.total([self._counters, *(each.counters for each in others)])
        yield from Ours(lambda: counters, self._lifecycle).collect()
        yield from merging.collected(self._lifecycle.scheduled_at, others)


class MetricsServer(socketserver.ThreadingMixIn, WSGIServer):
    """Answers every GET on a socket that listens already, with a thread per request."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, app: Any) -> None:
        super().__init__(listening.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        # Not looked up as the base class does: a name server that is silent would hold it up.
        self.server_name, self.server_port = listening.getsockname()[:2]
        self.setup_environ()
        self.set_app(app)

    def handle_error(self, _request: object, client_address: object) -> None:
        """A scraper that goes away is worth no traceback on stderr."""
        logger.debug("metrics: no answer to %s", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        """Say nothing: scrapes come every few seconds."""


def serve(
    listening: socket.socket,
    counters: Counters,
    lifecycle: Loaded,
    others: Callable[[], list[bytes]] | None = None,
) -> None:
    """Answer scrapes on `listening` until the process ends; `others` as for `registry`."""
    MetricsServer(listening, make_wsgi_app(registry(counters, lifecycle, others))).serve_forever()


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(name, text)
    family.add_metric([], *_buckets(histogram))
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus has them, cumulative and with their upper ends, and the sum."""
    total, counts = histogram.sum, list(histogram.counts)
    ends = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(ends, itertools.accumulate(counts), strict=True)), total


def _by_name(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the names of processes without their ids, of which every load has new ones."""
    found: dict[str, int] = {}
    for name, size in sizes.items():
        title = name.partition(" ")[0]
        found[title] = found.get(title, 0) + size
    return found
