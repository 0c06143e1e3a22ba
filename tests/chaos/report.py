"""What a run has found, as Markdown, and its figure."""

import dataclasses
import datetime
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.chaos import judge
from tests.chaos.clients import KINDS
from tests.chaos.plot import figure
from tests.chaos.run import Outcome
from tests.chaos.samples import Row
from tests.process.orchestrator import REPOSITORY

FOLDER = REPOSITORY / ".chaos"


def write(outcome: Outcome, found: list[str], folder: Path = FOLDER) -> Path:
    """Write the report, its figure, the samples and the log that says most into `folder`; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.svg").write_text(figure(outcome.sampler.rows), encoding="utf-8")
    (folder / "server.log").write_text(outcome.last_words, encoding="utf-8")
    names = [field.name for field in dataclasses.fields(Row)]
    table = [names, *([str(getattr(row, name)) for name in names] for row in outcome.sampler.rows)]
    (folder / "samples.tsv").write_text("".join("\t".join(cells) + "\n" for cells in table), encoding="utf-8")
    report = folder / "report.md"
    report.write_text("\n".join(lines(outcome, found)) + "\n", encoding="utf-8")
    return report


def lines(outcome: Outcome, found: list[str]) -> Iterator[str]:
    """The report."""
    record = outcome.record
    share = record.share_of_good(judge.NORMAL)
    calm = sum(sum(counts.values()) for counts in record.calm.values())
    calls = sum(sum(counts.values()) for counts in record.counts.values())
    now = datetime.datetime.now(datetime.UTC)
    yield f"# Chaos, {outcome.seconds:.0f} s, CHAOS_SEED={outcome.seed}"
    yield ""
    yield f"{now:%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}. ![over time](chaos.svg)"
    yield ""
    yield f"- {calls} calls, {calm} of them while nothing was done to the server"
    yield f"- {record.good} answers to the letter"
    yield f"- answered of the normal clients' calm calls: {share:.3%}"
    yield f"- {outcome.kills} blows, {outcome.servers} server processes"
    if outcome.seconds >= judge.LONG_RUN:
        memory, files = judge.memory(outcome), judge.files(outcome)
        yield (
            f"- soak: {memory.slope:+.2f} MiB/h (noise {memory.noise:.2f}), {files.slope:+.2f} open files/h"
            f" (noise {files.noise:.2f})"
        )
    grown, opened = judge.growth(outcome)
    yield f"- floors, last third of the soak against the first: {grown:+.1f} MiB, {opened:+.0f} open files"
    yield f"- violations: {len(found) or 'none'}"
    yield ""
    yield from (f"    {problem}" for problem in found)
    yield from _clients(outcome)
    yield from _kills(outcome)


def _clients(outcome: Outcome) -> Iterator[str]:
    codes = sorted({code for counts in outcome.record.counts.values() for code in counts}, key=lambda c: (c != "OK", c))
    yield f"| client | {' | '.join(codes)} |"
    yield f"|---|{'---|' * len(codes)}"
    for kind in KINDS:
        counts, calm = outcome.record.counts[kind], outcome.record.calm[kind]
        cells = (f"{counts[code]} ({calm[code]} calm)" if counts[code] else "" for code in codes)
        yield f"| {kind} | {' | '.join(cells)} |"
    yield ""


def _kills(outcome: Outcome) -> Iterator[str]:
    yield "| what was done | times | seconds to the next good answer: median | most |"
    yield "|---|---|---|---|"
    for what, seconds in outcome.record.recoveries.items():
        yield f"| {what} | {len(seconds)} | {statistics.median(seconds):.1f} | {max(seconds):.1f} |"
