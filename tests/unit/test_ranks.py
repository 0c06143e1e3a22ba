"""Who has come is read out of vLLM's log and off its ports; who has not is told, and not waited for without end."""

import asyncio
import inspect
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from vllm.v1.engine.utils import wait_for_engine_startup

from common import ranks as room
from common.engine_log import StageClock
from common.errors import LoadFailed
from common.ranks import HEARD, Connections, Ranks, built, connections
from tests.unit.test_topology import ARGS, parallel

VLLM = logging.getLogger(wait_for_engine_startup.__module__)
TWO = parallel(data_parallel_size=3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(room, "_GRACE_SECONDS", 0.0)


def seen(monkeypatch: pytest.MonkeyPatch, *peers: tuple[str, int], listening: bool = True) -> None:
    monkeypatch.setattr(room, "connections", lambda _port, _processes: Connections(listening, frozenset(peers)))


def say(status: str, rank: int, where: str = "remote") -> None:
    VLLM.debug(HEARD, status, where, rank)


def clock() -> StageClock:
    return StageClock(lambda _stage, _seconds: None)


@contextmanager
def building(ranks: Ranks, of: Any = TWO) -> Iterator["asyncio.Future[str]"]:
    with ranks.awaited(of, ARGS):
        yield asyncio.get_running_loop().create_future()


def test_the_words_are_vllms() -> None:
    assert f'"{HEARD}"' in inspect.getsource(wait_for_engine_startup)


def test_vllms_log_is_read_and_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen(monkeypatch)
    monkeypatch.setattr(VLLM, "propagate", False)
    monkeypatch.setattr(VLLM, "handlers", [caplog.handler])
    ranks, level = Ranks(), VLLM.level
    with ranks.awaited(TWO, ARGS):
        say("HELLO", 0, "local")
        say("HELLO", 1)
        VLLM.warning("a warning")
        ranks.look()
        assert [each.ranks for each in ranks.missing] == ["data-parallel rank 2"]
    assert [record.getMessage() for record in caplog.records] == ["a warning"]
    assert VLLM.level == level
    assert not VLLM.filters


def test_one_machine_alone_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "connections", lambda *_: pytest.fail("nobody is looked for"))
    ranks, level = Ranks(), VLLM.level
    with ranks.awaited(parallel(), ARGS):
        assert VLLM.level == level
        ranks.look()
    assert not ranks.missing


def test_nobody_is_missing_before_there_is_a_place_to_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, listening=False)
    ranks = Ranks()
    with ranks.awaited(TWO, ARGS):
        ranks.look()
        assert not ranks.missing
        seen(monkeypatch)
        ranks.look()
        assert len(ranks.missing) == 2


def test_nodes_come_to_the_master_port(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    args = ARGS | {"nnodes": 2}
    with ranks.awaited(parallel(nnodes=2, nnodes_within_dp=2, world_size=4), args):
        seen(monkeypatch, ("10.0.0.2", 1))
        ranks.look()
        assert [each.ranks for each in ranks.missing] == ["node 1"]
        assert "1 of their workers" in ranks.remark
        seen(monkeypatch, ("10.0.0.2", 1), ("10.0.0.2", 2))
        ranks.look()
        assert not ranks.missing
        # vLLM closes some of them later.
        seen(monkeypatch)
        ranks.look()
        assert not ranks.missing


async def test_the_log_and_status_say_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen(monkeypatch)
    ranks, stages = Ranks(), clock()
    caplog.set_level(logging.INFO, room.__name__)
    with building(ranks) as future:
        task = asyncio.create_task(built(future, ranks, stages, patience=60))
        await until(lambda: len(stages.waiting) == 2)
        assert all("run.sh serve org/model --headless" in line for line in stages.waiting)
        seen(monkeypatch, ("10.0.0.2", 1), ("10.0.0.2", 2))
        say("HELLO", 1)
        await until(lambda: len(stages.waiting) == 1)
        say("HELLO", 2)
        await until(lambda: not stages.waiting)
        future.set_result("built")
        assert await task == "built"
    told = [record.getMessage().partition(";")[0] for record in caplog.records]
    assert told == [
        "load: waiting for data-parallel rank 1",
        "load: waiting for data-parallel rank 2",
        "load: waiting for data-parallel rank 2",
        "load: all ranks of other machines have come",
    ]


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch)
    ranks = Ranks()
    with building(ranks) as future:
        with pytest.raises(
            LoadFailed, match=r"after 0.05 s \(rank_timeout\) there is still no data-parallel rank 1: run"
        ):
            await built(future, ranks, clock(), patience=0.05)
        assert not future.done()


async def test_a_rank_that_says_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen(monkeypatch, ("10.0.0.2", 1))
    ranks = Ranks()
    with building(ranks) as future, pytest.raises(LoadFailed, match="is connected and says nothing"):
        await built(future, ranks, clock(), patience=0.3)
    assert caplog.text.count("10.0.0.2 is connected and says nothing") == 1


async def test_a_rank_that_goes_away_while_it_loads_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, ("10.0.0.2", 1), ("10.0.0.3", 1))
    ranks = Ranks()
    with building(ranks) as future:
        say("HELLO", 1)
        say("HELLO", 2)
        task = asyncio.create_task(built(future, ranks, clock(), patience=60))
        await asyncio.sleep(0.2)
        assert not task.done()
        # One that is ready has no connection any more.
        say("READY", 1)
        seen(monkeypatch, ("10.0.0.3", 1))
        await asyncio.sleep(0.2)
        assert not task.done()
        seen(monkeypatch)
        with pytest.raises(LoadFailed, match="ranks 2, which had come, one went away"):
            await task


async def test_what_fails_by_itself_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch)
    ranks = Ranks()
    with building(ranks) as future:
        future.set_exception(RuntimeError("no memory"))
        with pytest.raises(RuntimeError, match="no memory"):
            await built(future, ranks, clock(), patience=60)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_connections_of_this_process_are_not_from_elsewhere(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as server:
        port = server.getsockname()[1]
        ourselves = [psutil.Process()]
        assert connections(port, ourselves) == Connections(listening=True, peers=frozenset())
        with socket.create_connection((host, port)), server.accept()[0]:
            assert connections(port, ourselves) == Connections(listening=True, peers=frozenset())
    assert connections(port, ourselves) == Connections(listening=False, peers=frozenset())


def test_a_peer_of_a_socket_for_both_families() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
            assert not connections(port, [psutil.Process()]).peers


async def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError(threading.current_thread().name)
