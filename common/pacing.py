"""How often an answer is parsed, where parsing takes more time than there is.

Many of vLLM's parsers of tool calls read a call from its begin with each piece: of one that writes a file of 32 kB,
qwen3_coder's takes 5 ms for a piece, however many tokens it has, and the event loop does nothing else meanwhile. vLLM
joins the tokens that nobody has taken. So whose parsing is costly takes them less often, as much as all such answers
together need to leave the loop half of its time; but often enough to be a stream.
"""

import time
from typing import Self

# Of one piece. What takes less is not looked at.
COSTLY_SECONDS = 0.0005
# Of the event loop's time, for all answers whose parsing is costly.
SHARE = 0.5
# From the begin of one piece to that of the next: 20 messages a second and more, no token late by more than 50 ms.
MOST_SECONDS = 0.04

now = time.monotonic


class Pace:
    """Of all answers that are parsed in one event loop.

    Attributes:
        round_seconds: what one piece of each answer takes, of those whose parsing is costly.

    """

    def __init__(self) -> None:
        self.round_seconds = 0.0

    def answer(self) -> "Paced":
        """One more; a context manager, until whose end it counts."""
        return Paced(self)


class Paced:
    """One answer."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._counted = self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._count(0.0)

    def due(self, began: float) -> float:
        """When the next piece is to be taken, of one whose parsing `began` then and has just ended; 0: at once."""
        took = now() - began
        # Whoever is interrupted once, by the collector or by another process, is not costly for it.
        usual, self._last = min(took, self._last), took
        if usual < COSTLY_SECONDS:
            if self._counted:
                self._count(0.0)
            return 0.0
        self._count(usual)
        return began + min(self._pace.round_seconds / SHARE, MOST_SECONDS)

    def _count(self, seconds: float) -> None:
        self._pace.round_seconds += seconds - self._counted
        self._counted = seconds
