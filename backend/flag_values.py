"""What flags and variables of the environment say, checked: each function returns the value, or names the flag."""

import re
from collections.abc import Sequence

# Of durations as Go writes them, which the orchestrator is written in; two signs for micro.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class SettingsError(Exception):
    """A flag or environment variable that can't be used; the text names it."""


def number(flag: str, text: str, low: float, high: float) -> float:
    """A number within bounds."""
    try:
        value = float(text)
    except ValueError:
        value = high + 1
    if not low <= value <= high:
        raise SettingsError(f"{flag} {text}: use a number from {low} to {high}")
    return value


def whole(flag: str, text: str, low: int, high: int) -> int:
    """A whole number within bounds, none of them negative."""
    if not re.fullmatch(r"\s*[0-9]{1,10}\s*", text) or not low <= int(text) <= high:
        allowed = f"{low}" if low == high else f"a whole number from {low} to {high}"
        raise SettingsError(f"{flag} {text}: use {allowed}")
    return int(text)


def switch(flag: str, text: str) -> bool:
    """On or off."""
    if text.lower() not in ("0", "1", "false", "true"):
        raise SettingsError(f"{flag} {text}: use 1, 0, true or false")
    return text.lower() in ("1", "true")


def one_of(flag: str, text: str, allowed: Sequence[str]) -> str:
    """A word in lower case, however it was written."""
    if text.lower() not in allowed:
        raise SettingsError(f"{flag} {text}: use one of {', '.join(allowed)}")
    return text.lower()


def seconds(flag: str, text: str, low: float, high: float) -> float:
    """A duration within bounds, in seconds."""
    value = _duration(text)
    if value is None or not low <= value <= high:
        raise SettingsError(f"{flag} {text}: use a duration like 500ms, 10s or 1m30s, from {low:g} to {high:g} seconds")
    return value


def host_and_port(flag: str, text: str, otherwise: str = "") -> str:
    """`HOST:PORT` or `[IPv6]:PORT`, the latter also without its brackets; `otherwise` names what is allowed as well."""
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]]+):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        allowed = ["HOST:PORT with a port from 0 to 65535", "[IPv6]:PORT", otherwise]
        raise SettingsError(f"{flag} {text}: use {', '.join(filter(None, allowed))}")
    host = match[1] if ":" not in match[1] or match[1].startswith("[") else f"[{match[1]}]"
    return f"{host}:{int(match[2])}"


def _duration(text: str) -> float | None:
    """Seconds of a duration, or of a plain number; None where it is neither."""
    digits = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
    if re.fullmatch(digits, text):
        return float(text)
    part = f"({digits})({'|'.join(sorted(_UNITS, key=len, reverse=True))})"
    if not re.fullmatch(rf"\+?(?:{part})+", text):
        return None
    return sum(float(value) * _UNITS[unit] for value, unit in re.findall(part, text))
