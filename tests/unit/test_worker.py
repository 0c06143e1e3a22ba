"""What the supervisor makes of signals that come at odd moments; `process/test_worker` has the rest."""

import asyncio
import os
import signal
import subprocess
from typing import Any

import psutil
import pytest
from aiohttp import web

from backend.membership import Membership
from backend.rank import Rank
from backend.worker import Supervisor, _Life, _patience, _run_registered
from backend.worker_settings import parse_worker_settings
from tests.frontend import StandInFrontend

FLAGS = ["--data-parallel-size=2", "--data-parallel-size-local=1", "--start-rank=1", "--master-addr=127.0.0.1"]


class FakeRank:
    """Ranks that only a kill ends."""

    pid = 1

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def processes(self) -> list[Any]:
        return []

    def signal(self, _number: int) -> None:
        pass

    async def wait(self) -> int:
        return await self._ended

    async def end(self) -> None:
        self._supervisor.stop(signal.SIGTERM)
        self._ended.set_result(128 + signal.SIGKILL)


async def test_a_signal_while_the_ranks_of_a_lost_head_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Supervisor(parse_worker_settings(["a/model", *FLAGS, "--master-port=1"]))

    async def start(*_: object) -> FakeRank:
        return FakeRank(supervisor)

    async def gone(*_: object) -> None:
        pass

    monkeypatch.setattr(Rank, "start", start)
    monkeypatch.setattr(Supervisor, "_head_is_gone", gone)
    async with asyncio.timeout(10):
        assert await supervisor.supervise() == 0


async def test_ranks_that_fail_again_and_again_are_a_failure_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM ends with 0 when an engine process of a follower has died, and systemd would leave it at that."""
    supervisor = Supervisor(parse_worker_settings(["a/model", *FLAGS, "--master-port=1"]))
    lives = 0

    async def live(_: Supervisor) -> _Life:
        nonlocal lives
        lives += 1
        life = _Life()
        life.met, life.status = life.started, 0
        return life

    monkeypatch.setattr(Supervisor, "_live", live)
    monkeypatch.setattr("backend.worker._FIRST_PAUSE", 0.0)
    async with asyncio.timeout(10):
        assert await supervisor.supervise() == 1
    assert lives == 10


@pytest.mark.parametrize(("age", "ended", "seconds"), [(1, False, 5), (100, False, 0), (100, True, 5), (1, True, 5)])
def test_how_long_ranks_without_connections_may_take_to_end(age: float, ended: bool, seconds: float) -> None:
    life = _Life()
    life.met = life.started - age
    with subprocess.Popen(["true" if ended else "cat"], stdin=subprocess.PIPE) as process:
        if ended:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert _patience(life, [psutil.Process(), psutil.Process(process.pid)]) == seconds


async def test_heartbeats_that_fail_for_good_do_not_keep_the_node_registered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def stay(*_: object) -> None:
        raise RuntimeError("no more of them")

    async def supervise(_: Supervisor) -> int:
        await asyncio.sleep(0.1)
        return 7

    monkeypatch.setattr(Membership, "stay", stay)
    monkeypatch.setattr(Supervisor, "supervise", supervise)
    async with StandInFrontend() as frontend:
        settings = parse_worker_settings(["a/model", *FLAGS, "--master-port=1", f"--register-to={frontend.url}"])
        assert settings.register_to is not None
        assert await _run_registered(settings, settings.register_to, Supervisor(settings)) == (7, None)
        assert frontend.calls[-1] == "deregister"
    assert "no heartbeats are sent any more" in caplog.text


async def test_a_password_of_the_frontend_s_is_not_shown() -> None:
    secret = "-".join("password")
    async with StandInFrontend() as frontend:
        frontend.fault = lambda _what: web.Response(status=403)
        url = frontend.url.replace("//", f"//u:{secret}@")
        settings = parse_worker_settings(["a/model", *FLAGS, "--master-port=1", f"--register-to={url}"])
        status, cause = await _run_registered(settings, url, Supervisor(settings))
    assert status == 1
    assert cause is not None
    assert cause.startswith(f"registering with {frontend.url} failed: 403")
