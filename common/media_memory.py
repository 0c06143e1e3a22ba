"""How much memory decoded media take: of one request, and of all requests in this process.

They count from before they are decoded until they are freed, whatever becomes of their request: what renders it may
hold them after its caller has left. Nothing waits for memory; what does not fit is refused.
"""

import contextlib
import contextvars
import gc
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from common.cpu_defaults import available_memory
from common.errors import InvalidRequest, Overloaded

# Between two times that Python is asked to collect, which stops all else for a while.
_COLLECT_SECONDS = 5


class _Request:
    """What the media of one request have taken so far."""

    taken = 0


_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("_request", default=None)


@contextlib.contextmanager
def one_request() -> Iterator[None]:
    """All that is taken within, and in tasks that are begun within, belongs to one request."""
    token = _request.set(_request.get() or _Request())
    try:
        yield
    finally:
        _request.reset(token)


class Memory:
    """Half of what `free` says in bytes, each time that nothing is taken."""

    def __init__(self, free: Callable[[], int] = available_memory) -> None:
        self._free = free
        self._lock = threading.Lock()
        self._most = 0
        self._held = 0
        self._collected = -math.inf
        # What was freed since. Python may free an object anywhere, even under the lock.
        self._freed: deque[int] = deque()

    @property
    def held(self) -> int:
        """Bytes that are taken."""
        with self._lock:
            return self._count()

    def take(self, where: str, size: int, most: int) -> None:
        """Count `size` bytes that the field `where` is about to take; they must come to `hold` or to `give_back`.

        Args:
            where: the field.
            size: in bytes.
            most: bytes that one request may take; 0: any.

        Raises:
            InvalidRequest: it is too much for one request.
            Overloaded: it is more than other media leave.

        """
        request = _request.get()
        with self._lock:
            total = size + (request.taken if request else 0)
            if total > most > 0:
                raise InvalidRequest(
                    where, f"takes the decoded media of this request to {total} bytes; {most} are allowed"
                )
            if not self._count():
                self._most = self._free() // 2
            if self._most - self._held < size and time.monotonic() - self._collected > _COLLECT_SECONDS:
                # An error holds the frames that it went through, and they hold it, until Python collects.
                gc.collect()
                self._count()
                self._collected = time.monotonic()
            if (left := self._most - self._held) < size:
                raise Overloaded(
                    f"{where}: takes {size} bytes when decoded; of {self._most} for all requests {left} are left"
                )
            self._held += size
            if request:
                request.taken = total

    def give_back(self, size: int) -> None:
        """Count no longer what `take` has counted."""
        self._freed.append(size)

    def hold(self, decoded: Any, size: int) -> None:
        """Count `size` bytes, which `take` has counted, until the picture or array `decoded` is freed."""
        while isinstance(decoded, np.ndarray) and isinstance(decoded.base, np.ndarray):
            decoded = decoded.base
        weakref.finalize(decoded, self._freed.append, size).atexit = False

    def _count(self) -> int:
        while self._freed:
            self._held -= self._freed.popleft()
        return self._held


MEMORY = Memory()
