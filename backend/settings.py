"""The settings of the process: flags first, then environment, then defaults, each documented once."""

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

MIB = 1024 * 1024
LOG_LEVELS = ("debug", "info", "warning", "error")


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
    shutdown_timeout: float = 10.0
    """Seconds the engine gets to shut down before its processes are killed; the orchestrator kills us after 15."""
    metrics_addr: str | None = None
    """Where Prometheus finds the metrics: `HOST:PORT` or `[IPv6]:PORT`; None opens no port and counts nothing."""
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
        "--shutdown-timeout",
        default=environ.get("BACKEND_SHUTDOWN_TIMEOUT", "10"),
        help="seconds for the engine to shut down (default 10; BACKEND_SHUTDOWN_TIMEOUT)",
    )
    parser.add_argument(
        "--metrics-addr",
        default=environ.get("BACKEND_METRICS_ADDR", ""),
        metavar="HOST:PORT",
        help="serve Prometheus metrics there; unset: nowhere (BACKEND_METRICS_ADDR)",
    )
    flags = parser.parse_args(argv)
    log_level = flags.log_level.lower()
    if log_level not in LOG_LEVELS:
        msg = f"--log-level {flags.log_level}: use one of {', '.join(LOG_LEVELS)}"
        raise SettingsError(msg)
    return Settings(
        addr=_address(flags.addr),
        max_message_mib=int(_number("--max-message-mib", flags.max_message_mib, 1, 2047, whole=True)),
        log_level=log_level,
        shutdown_timeout=_number("--shutdown-timeout", flags.shutdown_timeout, 0, 600),
        metrics_addr=_host_and_port("--metrics-addr", flags.metrics_addr) if flags.metrics_addr else None,
        auth_token=environ.get("LOCALAI_GRPC_AUTH_TOKEN") or None,
    )


def _address(text: str) -> str:
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").removeprefix("//"):
            raise SettingsError("--addr unix: needs a path after the colon")
        return text
    return _host_and_port("--addr", text, "or unix:PATH")


def _host_and_port(flag: str, text: str, otherwise: str = "") -> str:
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]]+):([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        allowed = ["HOST:PORT with a port from 0 to 65535", "[IPv6]:PORT", otherwise]
        msg = f"{flag} {text}: use {', '.join(filter(None, allowed))}"
        raise SettingsError(msg)
    host = match[1] if ":" not in match[1] or match[1].startswith("[") else f"[{match[1]}]"
    return f"{host}:{int(match[2])}"


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
