"""Whether ranks still have a head: what the connections of their processes with its machine tell.

vLLM's ranks do not watch their head. They hold connections with it from the handshake to their end, and these close
when it is freed or dies (or when it does not answer any more, see `common/links.py`); ZeroMQ then tries to connect to
whatever comes next, under an identity and in a state that the next head can't know.

On that machine there may be more: a proxy, a hub's mirror, whoever scrapes metrics. For a node the connections with
torch's store tell enough, for each worker keeps one to its end. A data-parallel rank closes its handshake when it is
ready, and what it keeps are sockets for requests and answers, at ports that it alone is told. Therefore all connections
count that it has opened, but those to ports that are known to be another service's.
"""

import contextlib
import math
import re
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import psutil

_ADDRESS_SECONDS = 10.0
# Ports of other services (RFC 6335), and those of URLs: proxies, HF_ENDPOINT, stores, collectors of traces.
_WELL_KNOWN = 1024
_URL_PORT = re.compile(r"(?:https?|socks[45][ah]?)://[^\s/?#\"']*:(\d{1,5})(?=[/?#\s,;\"']|$)", re.IGNORECASE)


class Link(NamedTuple):
    """An established connection, by what is unique about it as long as it stands."""

    local: tuple[str, int]
    remote: tuple[str, int]


class HeadWatch:
    """Judges looks at the connections, one after the other.

    Args:
        handshake_port: on which the head takes data-parallel ranks in and nobody connects twice; None without such.
        store_port: of torch's store, where nodes meet; None without such.
        services: ports of the head's machine that are not the head's.

    Attributes:
        met: whether there has been a connection to one of the head's two ports.

    """

    def __init__(
        self, handshake_port: int | None, store_port: int | None = None, services: Collection[int] = ()
    ) -> None:
        self._port = handshake_port
        self._own = {handshake_port, store_port}
        self._services = services
        self._last: frozenset[Link] = frozenset()
        self._empty = 0
        self.met = False

    def of_head(self, links: Iterable[Link]) -> frozenset[Link]:
        """Those of `links` that tell of the head, of all that the ranks have opened with its machine."""
        return frozenset(link for link in links if self._is_of_head(link.remote[1]))

    def is_gone(self, links: frozenset[Link]) -> bool:
        """Whether the head that there was is gone, now that there are `links` with it."""
        before, self._last = self._last, links
        self.met = self.met or any(link.remote[1] in self._own for link in links)
        # Twice: what the kernel lists while connections come and go may lack one.
        self._empty = 0 if links else self._empty + 1
        return self.met and (self._empty >= 2 or self._has_another_handshake(before, links))

    def _is_of_head(self, port: int) -> bool:
        if port in self._own or self._port is None:
            return port in self._own
        return port >= _WELL_KNOWN and port not in self._services

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


def service_ports(environ: Mapping[str, str], words: Iterable[str] = ()) -> frozenset[int]:
    """The ports that URLs in variables and words name, on whatever machine."""
    # Proxies go without a scheme, too.
    proxies = {environ[name] for name in environ if name.lower().endswith("_proxy") and name.lower() != "no_proxy"}
    texts = {*environ.values(), *words, *(f"http://{proxy}" for proxy in proxies)}
    return frozenset(int(port) for text in texts for port in _URL_PORT.findall(text))


def links_with(addresses: Collection[str], processes: Iterable[psutil.Process]) -> frozenset[Link]:
    """The established connections that `processes` have opened with a machine, but those among themselves."""
    found, listening = set(), set()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add(connection.laddr[1])
                elif connection.status == psutil.CONN_ESTABLISHED and connection.raddr:
                    found.add(Link(_end(connection.laddr), _end(connection.raddr)))
    return frozenset(
        link
        for link in found
        # What was accepted may come from a client of vLLM's own server.
        if link.remote[0] in addresses and link.local[1] not in listening and Link(link.remote, link.local) not in found
    )


def _end(address: tuple[str, int]) -> tuple[str, int]:
    return _plain(address[0]), address[1]


def _plain(address: str) -> str:
    """One name for each: IPv4 comes mapped into IPv6 from sockets that take both, and with a zone from links."""
    return address.partition("%")[0].removeprefix("::ffff:")
