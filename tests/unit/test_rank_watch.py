"""Connections with ranks that close, and those that are closed by ourselves."""

import asyncio
import ctypes
import os
import socket
import sys
from collections.abc import Iterator

import psutil
import pytest

from common.rank_watch import Connection, RankWatch, _to_port

# prctl(2)
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37

# Forks, so that it is no process of ours when it connects, and stays until the connection ends.
RANK = """
import os, socket, sys, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    socket.create_connection(("127.0.0.1", int(sys.argv[1]))).recv(1)
"""


async def settled(lost: list[str]) -> list[str]:
    await asyncio.sleep(0.6)
    return lost


async def test_a_connection_that_closes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        ours = Connection(os.getpid(), accepted.fileno(), os.fstat(accepted.fileno()).st_ino, "10.0.0.2")
        lost: list[str] = []
        watch = RankWatch([ours], 1, lost.append)
        assert await settled(lost) == []
        accepted.close()
        with socket.socket():  # may take the number of the descriptor
            (text,) = await settled(lost)
        assert "the connection with the ranks at 10.0.0.2 is gone" in text
        await watch.stop()
        client.close()


async def test_fewer_than_there_must_be() -> None:
    lost: list[str] = []
    watch = RankWatch([], 2, lost.append)
    assert await settled(lost) == ["only 0 of 2 ranks of other machines are connected"]
    await watch.stop()


async def test_stopped_it_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = Connection(os.getpid(), server.fileno(), os.fstat(server.fileno()).st_ino, "10.0.0.2")
        lost: list[str] = []
        await RankWatch([ours], 1, lost.append).stop()
    assert await settled(lost) == []


async def test_of_the_end_of_our_own_processes_vllm_tells() -> None:
    holder = await asyncio.create_subprocess_exec("true")
    await holder.wait()
    lost: list[str] = []
    watch = RankWatch([Connection(holder.pid, 3, 4, "10.0.0.2")], 1, lost.append)
    assert await settled(lost) == []
    await watch.stop()


def test_connections_among_our_own_are_none_with_ranks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            assert _to_port(port, [psutil.Process()]) == []


@pytest.fixture
def _no_orphans() -> Iterator[None]:
    """Orphans go to another process than this one, which tests of engines have made their parent."""
    libc, was = ctypes.CDLL(None), ctypes.c_int()
    assert libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0) == 0
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0
    yield
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, was.value, 0, 0, 0) == 0


@pytest.mark.usefixtures("_no_orphans")
async def test_connections_of_others() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        # Its parent is gone when it connects, so that it is no process of ours.
        rank = await asyncio.create_subprocess_exec(sys.executable, "-c", RANK, str(port))
        accepted, _ = await asyncio.to_thread(server.accept)
        with accepted:
            await rank.wait()
            (found,) = _to_port(port, [psutil.Process()])
            assert found.descriptor == accepted.fileno()
            assert found.peer == "127.0.0.1"
            assert found.stands
        assert not found.stands
