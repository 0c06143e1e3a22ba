"""The figure of a run: memory, open files and threads, and latencies over time, as SVG by hand."""

import math
from collections.abc import Iterator, Sequence

from tests.chaos.samples import Row

_WIDTH, _HEIGHT, _GAP = 860, 150, 40
_LEFT, _TOP = 70, 20
_COLOURS = ("#1f5fa8", "#c2571a")
_PANELS = (
    ("server, MiB", ("rss",)),
    ("engine, MiB", ("engine_rss",)),
    ("open files, threads", ("files", "threads")),
    ("latency, s: p50, p99", ("p50", "p99")),
)


def figure(rows: Sequence[Row]) -> str:
    """SVG of the rows; the soak has a grey ground, and a line breaks where one server ended and the next began."""
    height = _TOP + len(_PANELS) * (_HEIGHT + _GAP)
    end = rows[-1].at if rows else 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="100%" height="{height}" fill="white"/>',
    ]
    soak = next((row.at for row in rows if row.soak), end)
    for index, (title, quantities) in enumerate(_PANELS):
        top = _TOP + index * (_HEIGHT + _GAP)
        parts += _panel(rows, title, quantities, top=top, soak=soak)
    return "\n".join([*parts, "</svg>\n"])


def _panel(rows: Sequence[Row], title: str, quantities: Sequence[str], *, top: int, soak: float) -> Iterator[str]:
    end = rows[-1].at if rows else 1.0
    values = [value for row in rows for name in quantities if not math.isnan(value := getattr(row, name))]
    low, high = (0.0, 1.0) if not values else (min(values), max(values))
    if "p50" in quantities:
        low = 0.0
    if high - low < 1e-9:
        low, high = low - 1, high + 1

    def x(at: float) -> float:
        return _LEFT + at / end * _WIDTH

    def y(value: float) -> float:
        return top + _HEIGHT - (value - low) / (high - low) * _HEIGHT

    yield f'<rect x="{x(soak):.1f}" y="{top}" width="{x(end) - x(soak):.1f}" height="{_HEIGHT}" fill="#f0f0f0"/>'
    yield f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#888"/>'
    yield f'<text x="{_LEFT}" y="{top - 5}">{title}</text>'
    for value in (low, high):
        yield f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
    yield f'<text x="{_LEFT + _WIDTH}" y="{top + _HEIGHT + 15}" text-anchor="end">{end:.0f} s</text>'
    for name, colour in zip(quantities, _COLOURS, strict=False):
        for line in _lines(rows, name):
            points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in line)
            yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>'


def _lines(rows: Sequence[Row], name: str) -> Iterator[list[tuple[float, float]]]:
    line: list[tuple[float, float]] = []
    life = -1
    for row in rows:
        value = getattr(row, name)
        if math.isnan(value) or row.life != life:
            if line:
                yield line
            line = []
        if not math.isnan(value):
            line.append((row.at, value))
        life = row.life
    if line:
        yield line
