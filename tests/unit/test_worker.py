"""What the supervisor makes of signals that come at odd moments; `process/test_worker` has the rest."""

import asyncio
import signal
from typing import Any

import pytest

from backend.rank import Rank
from backend.worker import Supervisor
from backend.worker_settings import parse_worker_settings

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
