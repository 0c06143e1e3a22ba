"""The measures: a leak tilts the trend, requests that come and go do not; statuses are judged by the moment."""

import math
import random
import time
from pathlib import Path

import grpc
import pytest

from tests.chaos.clients import KINDS, chosen
from tests.chaos.parent import kept
from tests.chaos.record import GONE, NOTHING, Record
from tests.chaos.report import write
from tests.chaos.run import Outcome
from tests.chaos.samples import Row, Sampler, soak_rows, trend

Code = grpc.StatusCode
OK = frozenset({Code.OK})


def series(slope: float, *, seconds: int = 1200, seed: int = 1) -> tuple[list[float], list[float]]:
    """A server of 500 MiB with `slope` MiB per hour, and requests that take up to 30 MiB for a moment."""
    generator = random.Random(seed)
    times = [float(at) for at in range(seconds)]
    values = [500 + slope * at / 3600 + generator.expovariate(1 / 5) % 30 for at in times]
    return times, values


@pytest.mark.parametrize("slope", [0.0, 30.0, 3000.0])
def test_slope_is_found_within_its_noise(slope: float) -> None:
    found = trend(*series(slope))
    assert abs(found.slope - slope) <= max(found.noise, slope * 0.05)


def test_a_leak_of_a_request_a_second_stands_out() -> None:
    found = trend(*series(0.1 * 3600))
    assert found.slope > 1 + found.noise


def test_a_step_is_no_slope() -> None:
    times, values = series(0.0)
    found = trend(times, [value + (4 if at > 1000 else 0) for at, value in zip(times, values, strict=True)])
    assert found.slope <= 1 + found.noise


def test_a_constant_has_neither_slope_nor_noise() -> None:
    found = trend([float(at) for at in range(100)], [37.0] * 100)
    assert (found.slope, found.noise) == (0.0, 0.0)


def test_too_little_is_told() -> None:
    assert math.isinf(trend([0.0, 1.0], [1.0, 2.0]).noise)
    assert math.isinf(trend([float(at) for at in range(50)], [math.nan] * 50).noise)


def test_only_the_soak_counts_and_not_its_begin() -> None:
    rows = [Row(float(at), 1, soak=at >= 10) for at in range(20)]
    assert [row.at for row in soak_rows(rows, 0.5)] == [15.0, 16.0, 17.0, 18.0, 19.0]


def test_status_is_judged_by_what_was_done_meanwhile() -> None:
    record = Record()
    record.end_of_call("unary", Code.UNAVAILABLE, "", time.monotonic(), OK, probe=False)
    assert record.violation_count == 1
    trouble = record.begin("a kill", GONE, NOTHING)
    began = time.monotonic()
    record.end_of_call("unary", Code.UNAVAILABLE, "", began, OK, probe=False)
    assert record.violation_count == 1
    record.end_of_call("unary", Code.INTERNAL, "", began, OK, probe=False)
    record.end_of_call("prober", Code.UNAVAILABLE, "", began, OK, probe=True)
    assert record.violation_count == 3
    record.end(trouble)
    # A call that began before it was over may still feel it, a later one not.
    record.end_of_call("unary", Code.UNAVAILABLE, "", began, OK, probe=False)
    assert record.violation_count == 3
    record.end_of_call("unary", Code.UNAVAILABLE, "", time.monotonic() + 1, OK, probe=False)
    assert record.violation_count == 4
    assert record.share_of_good({"unary": True}) == 0.0


def test_violations_are_bounded() -> None:
    record = Record()
    for number in range(1000):
        record.violation(str(number))
    assert len(record.violations) < 100
    assert record.violation_count == 1000


def test_the_report_of_a_run(tmp_path: Path) -> None:
    sampler = Sampler(1.0)
    sampler.rows = [Row(float(at), 1, soak=at >= 20, rss=500.0 + at, files=20.0, p50=0.1) for at in range(1, 50)]
    record = Record()
    record.end_of_call("unary", Code.OK, "", time.monotonic(), OK, probe=False)
    trouble = record.begin("a kill", GONE, NOTHING)
    record.end(trouble)
    report = write(Outcome(1, 600.0, 1, 1, record, sampler, "the log", []), ["a problem"], tmp_path).read_text()
    assert "| unary | 1 (1 calm) |" in report
    assert "    a problem" in report
    assert "| a kill | 1 |" in report
    assert "+3600.00 MiB/h (noise 0.00)" in report
    assert len((tmp_path / "samples.tsv").read_text().splitlines()) == 50
    assert (tmp_path / "server.log").read_text() == "the log"
    assert (tmp_path / "chaos.svg").read_text().count("<polyline") == 3


def test_the_log_of_the_server_that_had_a_bug_is_kept() -> None:
    calm, long = "a calm end", "x" * 100_000
    bug = f"{long}internal error: a cause{long}"
    assert kept(calm, "") == kept(calm, "an older calm end") == calm
    of_the_bug = kept(bug, calm)
    assert "internal error: a cause" in of_the_bug
    assert len(of_the_bug) < len(long)
    assert kept(calm, of_the_bug) == of_the_bug
    assert kept("internal error: another", of_the_bug) == "internal error: another"
    assert 0 < len(kept(long, "")) < len(long)


def test_clients_of_some_kinds() -> None:
    assert list(chosen("")) == list(KINDS)
    assert list(chosen("prober, unary")) == ["unary", "prober"]
    with pytest.raises(ValueError, match="CHAOS_CLIENTS: nobody: use some of unary, "):
        chosen("unary,nobody")
