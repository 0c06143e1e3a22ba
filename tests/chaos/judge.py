"""What a run must have kept, in sentences about what it has not."""

import math
import os
import statistics
from collections.abc import Iterator

from tests.chaos.clients import KINDS, chosen
from tests.chaos.run import Outcome
from tests.chaos.samples import Row, Trend, soak_rows, trend

NORMAL = {name: kind.normal for name, kind in KINDS.items()}
# The part of calls by normal clients, while nothing is done to the server, that are answered.
LEAST_GOOD = 0.999
# What a server may grow by, in MiB per hour, and in files.
MOST_SLOPE = 1.0
MOST_FILES = 0.0
# Below this length of the whole, growth is judged in all instead: minutes say nothing about an hour.
LONG_RUN = 600.0
# A sound server's grows by 10 in its first minute and a half under load.
MOST_GROWTH = 16.0  # MiB, between the first and the last third of a soak
# The first part of a soak, in which what grows once grows: it takes some three minutes.
WARM_UP = 0.5
# Of what a soak's own noise could hide or feign, this part is granted on top.
_GRANTED = 1.0


def problems(outcome: Outcome) -> list[str]:
    """Everything that was not as it must be; empty for a run that passed."""
    return [*_behaviour(outcome), *_growth(outcome)]


def memory(outcome: Outcome) -> Trend:
    """MiB per hour of the server process, in the soak after its warm-up."""
    rows = soak_rows(outcome.sampler.rows, WARM_UP)
    return trend([row.at for row in rows], [row.rss for row in rows])


def files(outcome: Outcome) -> Trend:
    """Open files per hour, as `memory`."""
    rows = soak_rows(outcome.sampler.rows, WARM_UP)
    return trend([row.at for row in rows], [row.files for row in rows])


def growth(outcome: Outcome) -> tuple[float, float]:
    """MiB and files by which the floor of the last third of the soak is above that of its first third."""
    rows = soak_rows(outcome.sampler.rows, 0.0)
    third = len(rows) // 3
    first, last = rows[:third], rows[len(rows) - third :]
    return _floor(last, "rss") - _floor(first, "rss"), _floor(last, "files") - _floor(first, "files")


def _behaviour(outcome: Outcome) -> Iterator[str]:
    record = outcome.record
    yield from outcome.ended
    yield from record.violations
    if record.violation_count > len(record.violations):
        yield f"and {record.violation_count - len(record.violations)} more"
    share = record.share_of_good(NORMAL)
    if share < LEAST_GOOD:
        yield f"{share:.2%} of the calls of normal clients were answered while nothing was done to the server"
    # Each of the clients is idle for a tenth of a second at a time; one answer in ten seconds is next to none.
    if record.good < outcome.seconds / 10:
        yield f"only {record.good} right answers in {outcome.seconds:.0f} s"
    for kind in chosen(os.environ.get("CHAOS_CLIENTS", "")):
        if outcome.seconds >= LONG_RUN and not record.counts[kind]:
            yield f"no client of the kind {kind} came"


def _growth(outcome: Outcome) -> Iterator[str]:
    if outcome.seconds < LONG_RUN:
        grown, opened = growth(outcome)
        if not grown <= MOST_GROWTH:
            yield f"the server's memory grew by {grown:.1f} MiB within a soak of a few seconds"
        if not opened <= len(KINDS):
            yield f"the server has {opened:.0f} more files open than at the begin of the soak"
        return
    for what, found, most in (("MiB", memory(outcome), MOST_SLOPE), ("open files", files(outcome), MOST_FILES)):
        if not found.slope <= most + _GRANTED * found.noise or math.isinf(found.noise):
            yield f"{found.slope:+.2f} {what} per hour in the soak; allowed are {most:.0f}, noise is {found.noise:.2f}"


def _floor(rows: list[Row], quantity: str) -> float:
    values = [value for row in rows if not math.isnan(value := getattr(row, quantity))]
    # A tenth from the bottom: one sample in the midst of a reply's buffers is no floor, nor is one odd low.
    return statistics.quantiles(values, n=10, method="inclusive")[0] if len(values) > 1 else math.nan
