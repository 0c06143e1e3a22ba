"""Memory, open files, threads and latencies over time, and the slope of a series that a leak would tilt."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence

import psutil

MIB = 2**20
HOUR = 3600.0


@dataclasses.dataclass(slots=True)
class Row:
    """One interval: the least of each quantity, for peaks are requests in flight; percentiles of latencies in seconds.

    What no process was there for, or no call, is NaN.
    """

    at: float
    """Seconds since the run began; the end of the interval."""
    life: int
    """Which server process since the begin of the run; the rows of one life belong together."""
    soak: bool
    """Whether nothing is done to the server any more."""
    rss: float = math.nan
    """MiB of the server process."""
    engine_rss: float = math.nan
    """MiB of the engine's processes together."""
    files: float = math.nan
    threads: float = math.nan
    p50: float = math.nan
    p99: float = math.nan


class Sampler:
    """Looks at a server's processes whenever told, and keeps one row per `interval` seconds."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.rows: list[Row] = []
        self._started = time.monotonic()
        self._row = Row(0.0, 0, soak=False)
        self._latencies: list[float] = []

    @property
    def now(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._started

    def latency(self, seconds: float) -> None:
        """A normal client's unary call."""
        self._latencies.append(seconds)

    def look(self, server: int | None, engines: Sequence[psutil.Process], life: int, *, soak: bool) -> None:
        """Measure the process `server` and its `engines`."""
        row = self._row
        row.life, row.soak = life, soak
        with contextlib.suppress(psutil.Error):
            if server is not None:
                process = psutil.Process(server)
                row.rss = _least(row.rss, process.memory_info().rss / MIB)
                row.files = _least(row.files, process.num_fds())
                row.threads = _least(row.threads, process.num_threads())
                row.engine_rss = _least(row.engine_rss, sum(engine.memory_info().rss for engine in engines) / MIB)
        if self.now - (self.rows[-1].at if self.rows else 0.0) >= self.interval:
            row.at = self.now
            if len(self._latencies) > 1:
                percentiles = statistics.quantiles(self._latencies, n=100, method="inclusive")
                row.p50, row.p99 = percentiles[49], percentiles[98]
            self.rows.append(row)
            self._row, self._latencies = Row(0.0, life, soak=soak), []


@dataclasses.dataclass(frozen=True)
class Trend:
    """A line through a series, by Theil and Sen: the median of the slopes between all pairs.

    Attributes:
        slope: units per hour.
        noise: what a slope of 0 may look like: units per hour, from the scatter about the line and the time covered.
        points: how many.

    """

    slope: float
    noise: float
    points: int


def trend(times: Sequence[float], values: Sequence[float], floors: int = 60) -> Trend:
    """The trend of a series over `times` (seconds), after blocks of it have become their floors.

    At most `floors` blocks, so that what comes and goes with requests drops out. NaNs are left out; a series too short
    for a line has slope 0 and infinite noise.
    """
    pairs = [(at, value) for at, value in zip(times, values, strict=True) if not math.isnan(value)]
    size = max(1, math.ceil(len(pairs) / floors))
    blocks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    points = [min(block, key=lambda pair: pair[1]) for block in blocks]
    slopes = [
        (right[1] - left[1]) / (right[0] - left[0])
        for index, left in enumerate(points)
        for right in points[index + 1 :]
        if right[0] > left[0]
    ]
    if len(points) < 4 or not slopes:
        return Trend(0.0, math.inf, len(points))
    slope = statistics.median(slopes)
    residuals = [value - slope * at for at, value in points]
    middle = statistics.median(residuals)
    # 1.4826 makes a standard deviation of a median deviation; of a series that stands still but for a step, it is 0.
    deviation = 1.4826 * statistics.median(abs(residual - middle) for residual in residuals)
    span = points[-1][0] - points[0][0]
    # Neighbours are alike, so no credit is taken for their number.
    return Trend(slope * HOUR, 2 * deviation / span * HOUR, len(points))


def soak_rows(rows: Sequence[Row], warm_up: float) -> list[Row]:
    """The rows of the undisturbed end of a run, without the first part (`warm_up`, of 1) of it."""
    soak = [row for row in rows if row.soak]
    return soak[math.floor(len(soak) * warm_up) :]


def _least(before: float, value: float) -> float:
    return value if math.isnan(before) else min(before, value)
