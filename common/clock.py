"""The times of one request, and who is told of them."""

import time
from typing import Any

from common.observation import Observer


class Clock:
    """Prefill and decode times: the engine's where it keeps statistics, otherwise ours."""

    def __init__(self) -> None:
        self._started = self._first = self._last = 0.0
        self._first_tokens = 0

    def start(self, _prompt_tokens: int) -> None:
        """The request, of so many prompt tokens, goes to the engine."""
        self._started = time.monotonic()

    def tick(self, tokens: int) -> None:
        """So many tokens came."""
        self._last = time.monotonic()
        if not self._first:
            self._first, self._first_tokens = self._last, tokens

    def times(self, metrics: Any) -> tuple[float, float]:
        """Milliseconds of prefill and of decode; zeros where the answer came in one piece and nobody else measures."""
        if metrics is not None and metrics.scheduled_ts and metrics.first_token_ts:
            prefill = metrics.first_token_ts - metrics.scheduled_ts
            decode = metrics.last_token_ts - metrics.first_token_ts
        elif self._first == self._last and self._first_tokens > 1:
            return 0.0, 0.0
        else:
            prefill, decode = self._first - self._started, self._last - self._first
        return max(prefill, 0.0) * 1000, max(decode, 0.0) * 1000


class ObservedClock(Clock):
    """A class of its own, so that nothing is asked for every token where nobody observes."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def start(self, prompt_tokens: int) -> None:
        """See `Clock`."""
        super().start(prompt_tokens)
        self._observer.submitted(prompt_tokens)

    def tick(self, tokens: int) -> None:
        """See `Clock`."""
        super().tick(tokens)
        self._observer.output(tokens)

    def times(self, metrics: Any) -> tuple[float, float]:
        """See `Clock`."""
        if metrics is not None and metrics.queued_ts and metrics.scheduled_ts:
            self._observer.queued(max(metrics.scheduled_ts - metrics.queued_ts, 0.0))
        return super().times(metrics)
