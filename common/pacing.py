"""How often an answer is parsed, where parsing takes more time than there is.

Many of vLLM's parsers of tool calls read a call from its begin with each piece: of one that writes a file of 32 kB,
qwen3_coder's takes 5 ms for a piece, of one token as of many, and the event loop does nothing else meanwhile. vLLM
joins the tokens that nobody has taken. So whose parsing is costly takes them less often, as much as all such answers
together need to leave the loop half of its time; but often enough to be a stream. Where larger pieces cost as much as
their tokens did one by one (granite's parser; qwen3_coder's, of HTML), nothing is gained by it, and nobody waits.
"""

import time
from typing import Self

# Of one piece. What takes less is not looked at.
COSTLY_SECONDS = 0.0005
# Of the event loop's time, for all answers whose parsing is costly.
SHARE = 0.5
# That a piece waits for its tokens: 20 messages a second and more, and no token is late by more than 50 ms for it.
MOST_SECONDS = 0.04
# Of what its tokens cost one by one; a piece that costs more was not worth waiting for.
WORTH = 0.75
# Pieces until it is tried again.
MOST_VAIN = 64

now = time.thread_time


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
        self._counted = self._last = self._alone = 0.0
        self._vain = self._left = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._count(0.0)

    def pause(self, took: float, tokens: int) -> float:
        """Seconds to wait before the next piece is taken, after one of so many tokens that took so many to parse."""
        # A character may have two tokens, of which the first costs nothing.
        usual, self._last = (took + self._last) / 2, took
        if usual < COSTLY_SECONDS:
            self._count(0.0)
            return 0.0
        if tokens < 2:
            self._alone = (took + self._alone) / 2 if self._alone else took
        elif took > WORTH * tokens * self._alone > 0:
            self._vain = self._left = min(2 * self._vain or 1, MOST_VAIN)
        else:
            self._vain = 0
        if self._left:
            self._left -= 1
            self._count(0.0)
            return 0.0
        self._count(usual)
        return max(min(self._pace.round_seconds / SHARE - took, MOST_SECONDS), 0.0)

    def _count(self, seconds: float) -> None:
        if seconds != self._counted:
            self._pace.round_seconds += seconds - self._counted
            self._counted = seconds
