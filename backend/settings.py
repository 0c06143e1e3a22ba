"""The settings of the process: flags first, then environment, then defaults, each documented once."""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

from common.admission import Limits

MIB = 1024 * 1024
LOG_LEVELS = ("debug", "info", "warning", "error")
# The variables are the orchestrator's, who sets them for all its backends.
PARENT_WATCH = "LOCALAI_BACKEND_PARENT_WATCH"
PARENT_WATCH_INTERVAL = "LOCALAI_BACKEND_PARENT_WATCH_INTERVAL"
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


class SettingsError(Exception):
    """A flag or environment variable that can't be used; the text names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the serving process was told, once, at its start."""

    addr: str
    """Where to listen: `HOST:PORT`, `[IPv6]:PORT` (port 0: any free one) or `unix:PATH`."""
    max_message_mib: int = 50
    """Largest message to send or receive, MiB; the orchestrator's own limit is 50."""
    log_level: str = "info"
    """One of `LOG_LEVELS`."""
    drain_seconds: float = 5.0
    """Seconds that requests in flight get to finish once the process is to end; the orchestrator kills us after 15."""
    shutdown_timeout: float = 6.0
    """Seconds the engine then gets to shut down before its processes are killed."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """How many requests and prompt tokens are admitted."""
    parent_watch: float | None = 2.0
    """Seconds between two looks at whether the parent process is still there; None: nobody looks."""
    auth_token: str | None = dataclasses.field(default=None, repr=False)
    """When set, every RPC must carry `authorization: Bearer <token>`."""

    @property
    def max_message_bytes(self) -> int:
        """`max_message_mib` in bytes."""
        return self.max_message_mib * MIB


def parse_settings(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from the command line and the environment.

    Raises:
        SettingsError: a value that can't be used. (argparse itself exits for unknown flags.)

    """
    parser = argparse.ArgumentParser(
        prog="run.sh",
        description="Serve the Backend gRPC service; a model is loaded by the LoadModel RPC.",
        allow_abbrev=False,
    )
    parser.add_argument("--addr", required=True, metavar="HOST:PORT", help="or [IPv6]:PORT, or unix:PATH")
    parser.add_argument(
        "--max-message-mib",
        default=environ.get("BACKEND_MAX_MESSAGE_MIB", "50"),
        help="largest message either way (default 50; BACKEND_MAX_MESSAGE_MIB)",
    )
    parser.add_argument(
        "--log-level",
        default=environ.get("BACKEND_LOG_LEVEL", "info"),
        help="debug, info, warning or error (default info; BACKEND_LOG_LEVEL)",
    )
    parser.add_argument(
        "--drain-seconds",
        default=environ.get("BACKEND_DRAIN_SECONDS", "5"),
        help="seconds for requests in flight to finish at the end (default 5; BACKEND_DRAIN_SECONDS)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        default=environ.get("BACKEND_SHUTDOWN_TIMEOUT", "6"),
        help="seconds for the engine to shut down after that (default 6; BACKEND_SHUTDOWN_TIMEOUT)",
    )
    for name, what in (
        ("running-requests", "requests that the engine runs at a time (default: as vLLM has it)"),
        ("waiting-requests", "requests that wait beyond those (default: 1024, or 4 for each that can run)"),
        ("waiting-tokens", "prompt tokens that wait for their prefill (default: 1024 contexts)"),
    ):
        variable = f"BACKEND_MAX_{name.replace('-', '_').upper()}"
        parser.add_argument(f"--max-{name}", default=environ.get(variable) or None, help=f"{what}; {variable}")
    flags = parser.parse_args(argv)
    log_level = flags.log_level.lower()
    if log_level not in LOG_LEVELS:
        msg = f"--log-level {flags.log_level}: use one of {', '.join(LOG_LEVELS)}"
        raise SettingsError(msg)
    return Settings(
        addr=_address(flags.addr),
        max_message_mib=int(_number("--max-message-mib", flags.max_message_mib, 1, 2047, whole=True)),
        log_level=log_level,
        drain_seconds=_number("--drain-seconds", flags.drain_seconds, 0, 600),
        shutdown_timeout=_number("--shutdown-timeout", flags.shutdown_timeout, 0, 600),
        limits=Limits(
            running=_limit("--max-running-requests", flags.max_running_requests, 1),
            waiting=_limit("--max-waiting-requests", flags.max_waiting_requests, 0),
            waiting_tokens=_limit("--max-waiting-tokens", flags.max_waiting_tokens, 1),
        ),
        parent_watch=_parent_watch(environ),
        auth_token=environ.get("LOCALAI_GRPC_AUTH_TOKEN") or None,
    )


def _address(text: str) -> str:
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").removeprefix("//"):
            raise SettingsError("--addr unix: needs a path after the colon")
        return text
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]]+):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        msg = f"--addr {text}: use HOST:PORT with a port from 0 to 65535, [IPv6]:PORT, or unix:PATH"
        raise SettingsError(msg)
    host = match[1] if ":" not in match[1] or match[1].startswith("[") else f"[{match[1]}]"
    return f"{host}:{int(match[2])}"


def _parent_watch(environ: Mapping[str, str]) -> float | None:
    if environ.get(PARENT_WATCH, "").strip().lower() in ("false", "0", "no", "off"):
        return None
    text = environ.get(PARENT_WATCH_INTERVAL, "").strip() or "2s"
    seconds = duration(text)
    if seconds is None or not 0.001 <= seconds <= 3600:
        msg = f"{PARENT_WATCH_INTERVAL}={text}: use a duration like 500ms, 2s or 1m30s, or seconds, from 1ms to 1h"
        raise SettingsError(msg)
    return seconds


def duration(text: str) -> float | None:
    """Seconds of a duration as Go writes it, or of a plain number; None where it is neither."""
    number = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
    if re.fullmatch(number, text):
        return float(text)
    part = f"({number})({'|'.join(sorted(_DURATION_UNITS, key=len, reverse=True))})"
    if not re.fullmatch(rf"\+?(?:{part})+", text):
        return None
    return sum(float(value) * _DURATION_UNITS[unit] for value, unit in re.findall(part, text))


def _limit(flag: str, text: str | None, low: int) -> int | None:
    return None if text is None else int(_number(flag, text, low, 10**9, whole=True))


def _number(flag: str, text: str, low: float, high: float, *, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = high + 1
    if not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        msg = f"{flag} {text}: use {kind} from {low} to {high}"
        raise SettingsError(msg)
    return value
