"""Whether ranks still have a head: what the connections of their processes with its machine tell.

vLLM's ranks do not watch their head. They hold connections with it from the handshake to their end, and these close
when it is freed or dies (or when it does not answer any more, see `common/links.py`); ZeroMQ then tries to connect to
whatever comes next, under an identity and in a state that the next head can't know.
"""

import contextlib
import math
import socket
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

import psutil

_ADDRESS_SECONDS = 10.0


class Link(NamedTuple):
    """An established connection, by what is unique about it as long as it stands."""

    local: tuple[str, int]
    remote: tuple[str, int]


class HeadWatch:
    """Judges looks at the connections, one after the other.

    Args:
        handshake_port: on which the head takes ranks in and nobody connects twice; None where there is no such port.

    Attributes:
        met: whether there has been a connection.

    """

    def __init__(self, handshake_port: int | None) -> None:
        self._port = handshake_port
        self._last: frozenset[Link] = frozenset()
        self._empty = 0
        self.met = False

    def is_gone(self, links: frozenset[Link]) -> bool:
        """Whether the head that there was is gone, now that there are `links` with its machine."""
        before, self._last = self._last, links
        self.met = self.met or bool(links)
        # Twice: what the kernel lists while connections come and go may lack one.
        self._empty = 0 if links else self._empty + 1
        return self.met and (self._empty >= 2 or self._has_another_handshake(before, links))

    def _has_another_handshake(self, before: frozenset[Link], now: frozenset[Link]) -> bool:
        """One has gone and one has come; several ranks of one node have one each."""
        gone, come = (
            {link for link in links if link.remote[1] == self._port} for links in (before - now, now - before)
        )
        return bool(gone) and bool(come)


class Addresses:
    """All that a host's name has stood for so far; a head that is started again elsewhere takes its name along."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._known = {_plain(host)}
        self._asked = -math.inf

    def __call__(self) -> set[str]:
        """Asks the resolver now and then, which may take its time."""
        if time.monotonic() - self._asked > _ADDRESS_SECONDS:
            with contextlib.suppress(OSError, UnicodeError):  # Python's codec for names refuses some
                found = socket.getaddrinfo(self._host, None, type=socket.SOCK_STREAM)
                self._known |= {_plain(str(info[4][0])) for info in found}
            self._asked = time.monotonic()
        return self._known


def links_with(addresses: Collection[str], processes: Iterable[psutil.Process]) -> frozenset[Link]:
    """The established connections of `processes` with a machine, but those among themselves."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_ESTABLISHED and connection.raddr:
                    found.add(Link(_end(connection.laddr), _end(connection.raddr)))
    return frozenset(
        link for link in found if link.remote[0] in addresses and Link(link.remote, link.local) not in found
    )


def _end(address: tuple[str, int]) -> tuple[str, int]:
    return _plain(address[0]), address[1]


def _plain(address: str) -> str:
    """One name for each: IPv4 comes mapped into IPv6 from sockets that take both, and with a zone from links."""
    return address.partition("%")[0].removeprefix("::ffff:")
