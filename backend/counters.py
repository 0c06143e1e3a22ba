"""What the process counts about itself, as plain numbers: `backend.metrics` gives them their names when asked.

Written in the event loop alone, read in the thread that answers a scrape. Counting takes no locks and imports nothing,
because it happens for every token. Without a metrics port there are no counters.
"""

import bisect
import collections
import time
from collections.abc import Sequence

RPC_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
INTER_TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
QUEUE_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 300)


class Histogram:
    """Seconds by size.

    Attributes:
        bounds: upper ends of the buckets, inclusive; the last bucket has none.
        counts: observations by bucket, not cumulative; one more than there are bounds.
        sum: of all observations, seconds.

    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds


class Counters:
    """All numbers of the process, from its start on.

    Attributes:
        started: RPCs begun, by method.
        finished: RPCs ended, by (method, status code's name).
        rpc_seconds: how long they took, by method.
        first_token, inter_token: of streams, see `docs/metrics.md`.
        queued: how long requests waited in the engine's queue.
        prompt_tokens, completion_tokens: sums.

    """

    def __init__(self) -> None:
        self.started: collections.Counter[str] = collections.Counter()
        self.finished: collections.Counter[tuple[str, str]] = collections.Counter()
        self.rpc_seconds: dict[str, Histogram] = {}
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.inter_token = Histogram(INTER_TOKEN_BOUNDS)
        self.queued = Histogram(QUEUE_BOUNDS)
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def rpc_started(self, method: str) -> None:
        """An RPC begins."""
        self.started[method] += 1

    def rpc_finished(self, method: str, code: str, seconds: float) -> None:
        """The RPC that took so long ends with this status code."""
        self.finished[method, code] += 1
        histogram = self.rpc_seconds.get(method)
        if histogram is None:
            histogram = self.rpc_seconds[method] = Histogram(RPC_BOUNDS)
        histogram.observe(seconds)


class Request:
    """A `common.observation.Observer` of one request for a whole answer."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters

    def submitted(self, prompt_tokens: int) -> None:
        """See `Observer`."""
        self._counters.prompt_tokens += prompt_tokens

    def output(self, tokens: int) -> None:
        """See `Observer`."""
        self._counters.completion_tokens += tokens

    def queued(self, seconds: float) -> None:
        """See `Observer`."""
        self._counters.queued.observe(seconds)


class Stream(Request):
    """As `Request`, of a stream; made when the request arrives, which is what the first token is measured from."""

    def __init__(self, counters: Counters) -> None:
        super().__init__(counters)
        self._inter_token = counters.inter_token
        self._arrived = time.monotonic()
        self._last = 0.0

    def output(self, tokens: int) -> None:
        """See `Observer`. An output of several tokens counts as that many, each with its share of the time."""
        if not tokens:
            return  # a step of a chunked prefill
        counters = self._counters
        counters.completion_tokens += tokens
        now = time.monotonic()
        if self._last:
            gap = now - self._last
            histogram = self._inter_token
            histogram.counts[bisect.bisect_left(histogram.bounds, gap / tokens)] += tokens
            histogram.sum += gap
        else:
            counters.first_token.observe(now - self._arrived)
        self._last = now
