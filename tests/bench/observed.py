"""What the client of a number of streams sees of them, whichever way they come."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(slots=True)
class Stream:
    """One answer: when its messages came (seconds of one clock), the last of them, and when the end was told."""

    times: list[float] = dataclasses.field(default_factory=list)
    last: bytes = b""
    ended: float = 0.0


@dataclasses.dataclass(frozen=True)
class Observed:
    """Streams that began together.

    Attributes:
        seconds: from their begin to the end of the last.
        in_flight: how many had begun to answer and not ended, at the most.
        first: seconds to the first message, by stream.
        gap_p50, gap_p99, gap_most: seconds between a message and the next, of all streams.
        slowest_rate: messages per second of the stream that got fewest, from its first to its last.
        messages, sent, received: counts, and bytes on the wire.
        last: the last message of each stream, in hex.
        client_cpu: seconds that the client took.

    """

    seconds: float
    in_flight: int
    first: list[float]
    gap_p50: float
    gap_p99: float
    gap_most: float
    slowest_rate: float
    messages: int
    sent: int
    received: int
    last: list[str]
    client_cpu: float


def observed(
    streams: Sequence[Stream], started: float, *, sent: int = 0, received: int = 0, client_cpu: float = 0.0
) -> Observed:
    """Sum up finished streams that began at `started`."""
    gaps = [
        later - earlier for stream in streams for earlier, later in zip(stream.times, stream.times[1:], strict=False)
    ]
    rates = [
        (len(stream.times) - 1) / (stream.times[-1] - stream.times[0])
        for stream in streams
        if len(stream.times) > 1 and stream.times[-1] > stream.times[0]
    ]
    return Observed(
        seconds=max(stream.ended for stream in streams) - started,
        in_flight=_in_flight(streams),
        first=[stream.times[0] - started for stream in streams],
        gap_p50=percentile(gaps, 50),
        gap_p99=percentile(gaps, 99),
        gap_most=percentile(gaps, 100),
        slowest_rate=min(rates, default=math.inf),
        messages=sum(len(stream.times) for stream in streams),
        sent=sent,
        received=received,
        last=[stream.last.hex() for stream in streams],
        client_cpu=client_cpu,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of all are not above; NaN of none."""
    if not values:
        return math.nan
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def _in_flight(streams: Sequence[Stream]) -> int:
    """A whole answer counts from its begin, as nothing is seen of it before its end."""
    events = [
        (at, change)
        for stream in streams
        for at, change in ((stream.times[0] if len(stream.times) > 1 else 0.0, 1), (stream.ended, -1))
    ]
    most = now = 0
    # At one instant those that begin come before those that end.
    for _, change in sorted(events, key=lambda event: (event[0], -event[1])):
        now += change
        most = max(most, now)
    return most
