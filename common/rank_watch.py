"""A running head notices that ranks of other machines are gone, of which vLLM does not tell it.

What vLLM watches is its own child processes. A data-parallel rank that dies elsewhere leaves its requests waiting for
ever; the workers of another node are missed in the next collective operation, by those backends that time out. Both
hold a connection with the head from their start to their end: with ZeroMQ's socket for requests, and with the store at
`master_port`. Such a connection closes with the process at its other end, and `common/links.py` sees to it that it does
so when the machine is gone or cut off. Looking at a descriptor's inode is all that it takes to notice.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import psutil

from common import topology
from common.processes import engine_processes
from common.topology import Parallel

_INTERVAL = 0.25
_MAPPED = "::ffff:"


class Connection(NamedTuple):
    """A connection with a rank, by the descriptor that holds it."""

    pid: int
    descriptor: int
    inode: int
    peer: str

    @property
    def stands(self) -> bool | None:
        """Whether it does; None where the process that held it is gone itself."""
        if (inode := _inode(self.pid, self.descriptor)) is None and not psutil.pid_exists(self.pid):
            return None
        return inode == self.inode


class RankWatch:
    """Calls `on_loss` once, in the event loop, with what was lost.

    Args:
        connections: of `with_ranks`.
        expected: how many of them there must be; fewer are a loss that came first.

    """

    def __init__(self, connections: Iterable[Connection], expected: int, on_loss: Callable[[str], None]) -> None:
        self._connections = list(connections)
        self._expected = expected
        self._on_loss = on_loss
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Watch no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _watch(self) -> None:
        if len(self._connections) < self._expected:
            self._on_loss(f"only {len(self._connections)} of {self._expected} ranks of other machines are connected")
            return
        while not (lost := [each for each in self._connections if each.stands is False]):
            if not any(each.stands for each in self._connections):
                return  # our own processes are gone, of which vLLM tells
            await asyncio.sleep(_INTERVAL)
        peers = ", ".join(sorted({each.peer for each in lost}))
        self._on_loss(f"the connection with the ranks at {peers} is gone: they ended, or their machine or network did")


def with_ranks(llm: Any, parallel: Parallel) -> tuple[list[Connection], int]:
    """The connections of a running `AsyncLLM` with ranks of other machines, and how many there must be."""
    found: list[Connection] = []
    expected = 0
    if topology.waits_for_ranks(parallel):
        # Bound by this process; ranks connect to it once, and never again.
        port = int(llm.engine_core.input_socket.last_endpoint.rpartition(b":")[2])
        found += _to_port(port, [psutil.Process()])
        expected += parallel.data_parallel_size - parallel.data_parallel_size_local
    if parallel.nnodes_within_dp > 1:
        found += _to_port(parallel.master_port, engine_processes())
        expected += 1
    return found, expected


def _to_port(port: int, holders: list[psutil.Process]) -> list[Connection]:
    """What `holders` have accepted on `port`, but from our own processes."""
    own: set[tuple[str, int]] = set()
    accepted: dict[Connection, tuple[str, int]] = {}
    for process in {*holders, psutil.Process(), *engine_processes()}:
        with contextlib.suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if not each.raddr:
                    continue
                own.add(_plain(each.laddr))
                inode = _inode(process.pid, each.fd)
                if process in holders and each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED and inode:
                    peer = _plain(each.raddr)
                    accepted[Connection(process.pid, each.fd, inode, peer[0])] = peer
    return [connection for connection, peer in accepted.items() if peer not in own]


def _inode(pid: int, descriptor: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}/fd/{descriptor}").st_ino
    except OSError:
        return None


def _plain(address: Any) -> tuple[str, int]:
    """Without the prefix that a socket of both families shows an IPv4 address with."""
    return str(address.ip).removeprefix(_MAPPED), int(address.port)
