"""The settings of the process: flags first, then environment, then defaults, each documented once."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence

from backend.flag_values import SettingsError, host_and_port, number, one_of, seconds, switch, whole
from backend.versions import versions
from common.admission import Limits

MIB = 1024 * 1024
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
# Each takes some 600 MB, and one engine's own process has no work for more.
MOST_FRONTENDS = 64
_EPILOG = """\
environment without a flag:
  LOCALAI_GRPC_AUTH_TOKEN                      when set, every RPC needs "authorization: Bearer TOKEN"
  LOCALAI_BACKEND_PARENT_WATCH                 "false": don't end with the parent process
  LOCALAI_BACKEND_PARENT_WATCH_INTERVAL        how often it is looked for (default 2s)
  VLLM_*, HF_HOME, CUDA_VISIBLE_DEVICES, ...   vLLM's own, passed through

A flag beats its environment variable. `run.sh chat --help` has a terminal client, `run.sh plan --help` computes how to
split a model over machines, `run.sh worker --help` has ranks of a model whose head is on another machine.
exit status: 0 after SIGTERM or SIGINT, 1 when the engine died or the parent went away (--check: when it can't serve),
2 for flags, addresses and files that can't be used; the last line on stderr says why. docs/running.md has the rest.
"""
# The variables are the orchestrator's, who sets them for all its backends.
PARENT_WATCH = "LOCALAI_BACKEND_PARENT_WATCH"
PARENT_WATCH_INTERVAL = "LOCALAI_BACKEND_PARENT_WATCH_INTERVAL"


@dataclasses.dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files; `backend.tls` reads and checks them."""

    cert: str
    key: str
    client_ca: str | None = None
    """When set, clients must show a certificate of one of these authorities."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the serving process was told, once, at its start."""

    addr: str
    """Where to listen: `HOST:PORT`, `[IPv6]:PORT` (port 0: any free one) or `unix:PATH`."""
    max_message_mib: int = 50
    """Largest message to send or receive, MiB; the orchestrator's own limit is 50."""
    log_level: str = "info"
    """One of `LOG_LEVELS`."""
    log_format: str = "text"
    """One of `LOG_FORMATS`."""
    drain_seconds: float = 5.0
    """Seconds that requests in flight get to finish once the process is to end; the orchestrator kills us after 15."""
    shutdown_timeout: float = 6.0
    """Seconds the engine then gets to shut down before its processes are killed."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """How many requests and prompt tokens are admitted."""
    frontends: int = 1
    """Processes that serve the port, this one included, over one engine."""
    parent_watch: float | None = 2.0
    """Seconds between two looks at whether the parent process is still there; None: nobody looks."""
    metrics_addr: str | None = None
    """Where Prometheus finds the metrics: `HOST:PORT` or `[IPv6]:PORT`; None opens no port and counts nothing."""
    auth_token: str | None = dataclasses.field(default=None, repr=False)
    """When set, every RPC must carry `authorization: Bearer <token>`."""
    tls: TlsFiles | None = None
    """None serves in the clear."""
    channelz: bool = False
    """Whether to serve gRPC's own statistics, `grpc.channelz.v1`."""
    check: str | None = None
    """Not None: report on the installation, and on the model that this names unless it is empty, instead of serving."""

    @property
    def checks_clients(self) -> bool:
        """Whether a caller must show a token or a certificate."""
        return self.auth_token is not None or (self.tls is not None and self.tls.client_ca is not None)

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
        description="Serve the Backend gRPC service on --addr; a model is loaded by the LoadModel RPC.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--addr", metavar="HOST:PORT", help="or [IPv6]:PORT, or unix:PATH; port 0 takes a free one")
    parser.add_argument(
        "--check",
        nargs="?",
        const="",
        metavar="MODEL",
        help="don't serve: print what is installed and what would be used, and of MODEL (a folder, a GGUF file or a "
        "hub id) how it would be loaded; exit status 0 if this can serve, 1 if not",
    )
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
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
    parser.add_argument(
        "--frontends",
        default=environ.get("BACKEND_FRONTENDS", "1"),
        help="processes that serve the port, over one engine (default 1; BACKEND_FRONTENDS)",
    )
    parser.add_argument(
        "--log-format",
        default=environ.get("BACKEND_LOG_FORMAT", "text"),
        help="text, or json for one object per line (default text; BACKEND_LOG_FORMAT)",
    )
    parser.add_argument(
        "--tls-cert",
        metavar="FILE",
        default=environ.get("BACKEND_TLS_CERT") or None,
        help="serve TLS with this certificate chain, PEM, the server's own first (BACKEND_TLS_CERT)",
    )
    parser.add_argument(
        "--tls-key",
        metavar="FILE",
        default=environ.get("BACKEND_TLS_KEY") or None,
        help="its private key, PEM, without a password (BACKEND_TLS_KEY)",
    )
    parser.add_argument(
        "--tls-client-ca",
        metavar="FILE",
        default=environ.get("BACKEND_TLS_CLIENT_CA") or None,
        help="take only clients with a certificate of these authorities, PEM (BACKEND_TLS_CLIENT_CA)",
    )
    parser.add_argument(
        "--channelz",
        action="store_true",
        help="serve grpc.channelz.v1, gRPC's statistics of connections; needs grpcio-channelz (BACKEND_CHANNELZ=1)",
    )
    parser.add_argument(
        "--metrics-addr",
        default=environ.get("BACKEND_METRICS_ADDR", ""),
        metavar="HOST:PORT",
        help="serve Prometheus metrics there; unset: nowhere (BACKEND_METRICS_ADDR)",
    )
    flags = parser.parse_args(argv)
    if flags.version:
        print(versions())  # noqa: T201  # what was asked for
        sys.exit(0)
    if flags.addr is None and flags.check is None:
        parser.error("the following arguments are required: --addr")
    frontends = whole("--frontends", flags.frontends, 1, MOST_FRONTENDS)
    if frontends > 1 and flags.addr is not None and flags.addr.startswith("unix:"):
        msg = f"--frontends {frontends}: needs HOST:PORT; several processes can't listen on {flags.addr}"
        raise SettingsError(msg)
    return Settings(
        frontends=frontends,
        addr="" if flags.addr is None else _address(flags.addr),
        max_message_mib=whole("--max-message-mib", flags.max_message_mib, 1, 2047),
        log_level=one_of("--log-level", flags.log_level, LOG_LEVELS),
        drain_seconds=number("--drain-seconds", flags.drain_seconds, 0, 600),
        shutdown_timeout=number("--shutdown-timeout", flags.shutdown_timeout, 0, 600),
        log_format=one_of("--log-format", flags.log_format, LOG_FORMATS),
        limits=Limits(
            running=_limit("--max-running-requests", flags.max_running_requests, 1),
            waiting=_limit("--max-waiting-requests", flags.max_waiting_requests, 0),
            waiting_tokens=_limit("--max-waiting-tokens", flags.max_waiting_tokens, 1),
        ),
        parent_watch=_parent_watch(environ),
        metrics_addr=host_and_port("--metrics-addr", flags.metrics_addr) if flags.metrics_addr else None,
        auth_token=_token(environ.get("LOCALAI_GRPC_AUTH_TOKEN", "")),
        tls=_tls(flags.tls_cert, flags.tls_key, flags.tls_client_ca),
        channelz=flags.channelz or switch("BACKEND_CHANNELZ", environ.get("BACKEND_CHANNELZ") or "0"),
        check=flags.check,
    )


def _token(text: str) -> str | None:
    # What no client could send as metadata would lock everyone out; the token itself is not shown.
    if not text.isprintable() or not text.isascii() or text != text.strip():
        msg = "LOCALAI_GRPC_AUTH_TOKEN: use printable ASCII characters, without blanks at the ends"
        raise SettingsError(msg)
    return text or None


def _tls(cert: str | None, key: str | None, client_ca: str | None) -> TlsFiles | None:
    if cert is not None and key is not None:
        return TlsFiles(cert, key, client_ca)
    for flag, value in (("--tls-cert", cert), ("--tls-key", key), ("--tls-client-ca", client_ca)):
        if value is not None:
            missing = " and ".join(name for name, given in (("--tls-cert", cert), ("--tls-key", key)) if given is None)
            msg = f"{flag} {value}: needs {missing} too"
            raise SettingsError(msg)
    return None


def _address(text: str) -> str:
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").removeprefix("//"):
            raise SettingsError("--addr unix: needs a path after the colon")
        return text
    return host_and_port("--addr", text, "or unix:PATH")


def _parent_watch(environ: Mapping[str, str]) -> float | None:
    if environ.get(PARENT_WATCH, "").strip().lower() in ("false", "0", "no", "off"):
        return None
    return seconds(PARENT_WATCH_INTERVAL, environ.get(PARENT_WATCH_INTERVAL, "").strip() or "2s", 0.001, 3600)


def _limit(flag: str, text: str | None, low: int) -> int | None:
    return None if text is None else whole(flag, text, low, 10**9)
