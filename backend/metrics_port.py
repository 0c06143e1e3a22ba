"""The metrics port: open before the gRPC port is, answered from a thread of its own as soon as that can be imported."""

import logging
import os
import socket
import threading
from collections.abc import Callable

from backend.counters import Counters
from backend.flag_values import SettingsError
from backend.lifecycle import Lifecycle
from backend.sockets import resolved

logger = logging.getLogger(__name__)


def bind(addr: str) -> socket.socket:
    """A socket that listens on `addr` (as `Settings.metrics_addr`); scrapes wait in it until they are answered.

    Raises:
        SettingsError: with the system's reason.

    """
    host = addr.rpartition(":")[0].strip("[]")
    try:
        family, _, _, address = resolved(addr)[0]
        # As gRPC does for this address: IPv4 as well.
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=both)
    except OSError as error:
        # Python adds the address to the system's text.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        msg = f"--metrics-addr: cannot listen on {addr}: {reason}"
        raise SettingsError(msg) from error


def address_of(listening: socket.socket) -> str:
    """`HOST:PORT` or `[IPv6]:PORT`, with the port that was taken."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve_in_background(
    listening: socket.socket,
    counters: Counters,
    lifecycle: Lifecycle,
    others: Callable[[], list[bytes]] | None = None,
) -> None:
    """Answer scrapes in a thread, which never holds up the process's exit; with `others`, as `metrics.serve`."""

    def serve() -> None:
        try:
            from backend import metrics

            metrics.serve(listening, counters, lifecycle, others)
        except BaseException:  # the server serves without it
            logger.exception("metrics can't be served")

    threading.Thread(target=serve, name="metrics", daemon=True).start()
    logger.info("metrics on http://%s/metrics", address_of(listening))
