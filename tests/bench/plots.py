"""Throughput against concurrency, and latencies, as SVG."""

from collections.abc import Sequence
from pathlib import Path

from tests.bench.figures import IN_PROCESS, Measured

_PANELS = (
    ("tokens_per_s", "tokens/s"),
    ("cpu", "serving CPU, µs/token"),
    ("first_p50", "first message p50, ms"),
    ("gap_p99", "between messages p99, ms"),
)


def draw(folder: Path, measured: Sequence[Measured]) -> None:
    """A figure for each of the fleets that answer a chat at several concurrencies."""
    import matplotlib as mpl

    mpl.use("svg")
    # The same figure from the same numbers, to the byte.
    mpl.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "none"})
    for fleet in ("toy", "smollm2"):
        cells = [
            each
            for each in measured
            if each.cell.fleet == fleet and each.cell.tokens == 128 and not each.cell.connections and not each.cell.idle
        ]
        if len(cells) > 1:
            _figure(folder / f"throughput-{fleet}.svg", sorted(cells, key=lambda each: each.cell.streams))


def _figure(path: Path, cells: Sequence[Measured]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    names = list(dict.fromkeys(name for each in cells for name in each.rounds))
    for axes, (quantity, title) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for name in names:
            points = [(each.cell.streams, each.summary(name, quantity)) for each in cells if name in each.rounds]
            medians = [summary.median for _, summary in points]
            low = [summary.median - summary.low for _, summary in points]
            high = [summary.high - summary.median for _, summary in points]
            style = "--" if name.startswith(IN_PROCESS) else "-"
            axes.errorbar([at for at, _ in points], medians, [low, high], label=name, ls=style, marker=".", capsize=2)
        axes.set_xscale("log", base=2)
        axes.set_xticks([each.cell.streams for each in cells], [str(each.cell.streams) for each in cells])
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.supxlabel("requests at once")
    figure.savefig(path, metadata={"Date": None})
