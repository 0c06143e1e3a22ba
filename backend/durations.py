"""Durations as Go writes them, which the orchestrator is written in."""

import re

_DURATION_UNITS = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
}  # two signs for micro


def duration(text: str) -> float | None:
    """Seconds of a duration as Go writes it, or of a plain number; None where it is neither."""
    number = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
    if re.fullmatch(number, text):
        return float(text)
    part = f"({number})({'|'.join(sorted(_DURATION_UNITS, key=len, reverse=True))})"
    if not re.fullmatch(rf"\+?(?:{part})+", text):
        return None
    return sum(float(value) * _DURATION_UNITS[unit] for value, unit in re.findall(part, text))
