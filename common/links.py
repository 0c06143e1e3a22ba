"""Connections between the machines of one model notice that the other machine is gone.

TCP by itself tells of a process that ended, but not of a machine that lost its power or its network: an idle connection
stands for ever, one with data under way for a quarter of an hour. vLLM, ZeroMQ and gloo leave it at that.

`begin` is for the engine's own processes: a thread there makes the kernel ask once a second whether the other end still
answers, and closes a connection that has not for the timeout; gloo then fails, ZeroMQ connects anew. TCP_USER_TIMEOUT
would be shorter, but ends connections to a process that is only slow to read, too. `guarded_listeners` is for the
server, whose other connections are none of this module's business: sockets that start to listen while it is entered
hand the kernel's timeout on to all that they accept. Those belong to ZeroMQ, which always reads.
"""

import contextlib
import ipaddress
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator, Mapping

# Seconds; where it is unset, nothing is watched.
VARIABLE = "BACKEND_LINK_TIMEOUT"
DEFAULT_TIMEOUT = 3.0

_INTERVAL = 0.5
# Seconds between two probes of an idle connection.
_PROBE_SECONDS = 1
# Attempts to connect: after 3 s a fresh one is better than the kernel's next, which come ever later.
_MOST_SYNS = 1
# Ports of other services: a download from a hub may stall for longer than a rank.
_WELL_KNOWN = 1024
_ESTABLISHED = 1  # linux/tcp_states.h
# linux/tcp.h: tcpi_state, tcpi_retransmits and tcpi_probes are bytes 0, 2 and 3, tcpi_last_ack_recv (ms) is at 56.
_TCP_INFO = struct.Struct("@BxBB52xI")


def timeout(environ: Mapping[str, str] = os.environ) -> float:
    """What the environment says, or the default where it says nothing that can be used."""
    with contextlib.suppress(ValueError):
        if 1 <= (seconds := float(environ.get(VARIABLE, ""))) <= 3600:
            return seconds
    return DEFAULT_TIMEOUT


def begin() -> None:
    """In a process spawned for the engine: watch its connections from now on, if the variable is set."""
    if os.environ.get(VARIABLE):
        threading.Thread(target=Guard(timeout()).run, name="links", daemon=True).start()


@contextlib.contextmanager
def guarded_listeners(seconds: float) -> Iterator[None]:
    """Give sockets that this process starts to listen on meanwhile a timeout, which what they accept inherits."""
    guard, done = _ListenerGuard(seconds), threading.Event()

    def run() -> None:
        while not done.wait(_INTERVAL):
            guard.look()

    thread = threading.Thread(target=run, name="listener-links", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        guard.look()


class Guard:
    """Watches all connections of this process with other machines."""

    def __init__(self, seconds: float) -> None:
        self._milliseconds = round(seconds * 1000)
        self._seen: dict[int, bool] = {}

    def run(self) -> None:
        """Look, for ever."""
        pause = threading.Event()
        while not pause.wait(_INTERVAL):
            self.look()

    def look(self) -> None:
        """Take new sockets in, and close the connections whose other end does not answer."""
        found = dict(_sockets())
        self._seen = {inode: watched for inode, watched in self._seen.items() if inode in found}
        for inode, descriptor in found.items():
            if self._seen.get(inode, True):
                with contextlib.suppress(OSError), _opened(descriptor) as connection:
                    self._seen[inode] = self._watch(connection, new=inode not in self._seen)

    def _watch(self, connection: socket.socket, *, new: bool) -> bool:
        """Whether it is to be looked at again."""
        if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        try:
            host, port = connection.getpeername()[:2]
        except OSError:
            # Listening, or still connecting.
            _ask(connection, probes=max(self._milliseconds // 1000, 1))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, _MOST_SYNS)
            return True
        if port < _WELL_KNOWN or ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            return False
        if new:
            _ask(connection, probes=max(self._milliseconds // 1000, 1))
        elif self._is_dead(connection):
            connection.shutdown(socket.SHUT_RDWR)
            return False
        return True

    def _is_dead(self, connection: socket.socket) -> bool:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        state, retransmits, probes, silent = _TCP_INFO.unpack(info)
        # A reader that is slow answers every probe, though these come ever more seldom.
        return bool(state == _ESTABLISHED and silent > self._milliseconds and max(retransmits, probes) >= 2)


class _ListenerGuard:
    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._others = {inode for inode, _ in _sockets()}
        self._ports: set[int] = set()

    def look(self) -> None:
        for inode, descriptor in _sockets():
            if inode in self._others:
                continue
            with contextlib.suppress(OSError), _opened(descriptor) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and self._is_ours(connection):
                    self._others.add(inode)
                    _ask(connection, probes=max(int(self._seconds), 1))
                    milliseconds = round(self._seconds * 1000)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def _is_ours(self, connection: socket.socket) -> bool:
        """A listener of after the start, or what it accepted before it was seen."""
        port: int = connection.getsockname()[1]
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            self._ports.add(port)
        return port in self._ports


def _ask(connection: socket.socket, *, probes: int) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)


def _sockets() -> Iterator[tuple[int, int]]:
    """Inode and descriptor of each socket of this process."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield status.st_ino, int(name)


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[socket.socket]:
    """The socket behind a descriptor that is another's, who may close it meanwhile."""
    with socket.socket(fileno=os.dup(descriptor)) as opened:
        yield opened
