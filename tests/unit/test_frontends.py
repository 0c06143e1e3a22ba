"""When the other processes are told what, and what becomes of those that don't do it; the processes are of straw."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from backend import frontends as module
from backend.ending import Ending
from backend.flag_values import SettingsError
from backend.frontends import FrontendProcesses
from backend.lifecycle import Lifecycle, State
from backend.peer import Peer
from backend.private_folder import make
from backend.settings import Settings
from common import private_folders
from common.errors import EngineGone, LoadFailed
from common.frontends import Alone, Tokens
from tests.unit.test_ending import leaves_time
from tests.unit.test_lifecycle import FakeModel, fake, options, until

__all__ = ["fake"]


class Told(Alone):
    """Keeps what it is told, and in which state of the lifecycle."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.ending = Ending()
        self.lifecycle = Lifecycle(self.ending, shutdown_timeout=1.0, frontends=self)
        self.busy = asyncio.Event()

    def _keep(self, event: str) -> None:
        self.events.append(f"{event} {self.lifecycle.state.value}")

    async def open(self, identity: str) -> None:
        self._keep(f"open {identity}")

    async def idle(self) -> None:
        self._keep("idle")
        await self.busy.wait()

    async def engine_died(self) -> None:
        self._keep("engine died")


@pytest.fixture
async def told(fake: type[FakeModel]) -> Told:  # a fixture
    told = Told()
    told.lifecycle.import_in_background()
    return told


async def test_they_serve_once_the_model_is_ready_and_learn_its_new_name(told: Told) -> None:
    await told.lifecycle.load(options("a"))
    assert told.events == ["open a ready"]
    with pytest.raises(LoadFailed):
        await told.lifecycle.load(options("broken"))
    assert told.events == ["open a ready"]


async def test_a_drain_waits_for_them_and_no_longer_than_it_may(told: Told) -> None:
    await told.lifecycle.load(options("a"))
    told.lifecycle.drain()
    idle = asyncio.create_task(told.lifecycle.idle())
    await until(lambda: told.events[1:] == ["idle draining"])
    await asyncio.sleep(0.01)
    assert not idle.done()
    told.busy.set()
    await asyncio.wait_for(idle, 1)
    told.busy.clear()
    idle = asyncio.create_task(told.lifecycle.idle())
    await asyncio.wait_for(told.ending.wait(idle, 0.05), 1)
    waiting = asyncio.create_task(told.ending.wait(idle, 60))
    told.ending.ask(hurry=True)
    await asyncio.wait_for(waiting, 1)
    assert not idle.done()
    idle.cancel()
    await told.lifecycle.free()


async def test_they_hear_of_the_engines_death_first(told: Told) -> None:
    await told.lifecycle.load(options("a"))
    vars(told.lifecycle.model_for(""))["dead"] = True
    error = await told.lifecycle.explained(RuntimeError())
    assert str(error) == "the engine died: ValueError: gone"
    assert told.events[1:] == ["engine died failed"]
    await told.lifecycle.free()


async def test_one_that_is_lost_ends_the_process_at_once(told: Told) -> None:
    await told.lifecycle.load(options("a"))
    told.lifecycle.fail("frontend 2 is gone")
    assert told.lifecycle.state is State.FAILED
    assert await told.ending.asked() == "frontend 2 is gone"
    assert not await leaves_time(told.ending)
    assert str(await told.lifecycle.explained(EngineGone("x"))) == "frontend 2 is gone"
    assert told.events[1:] == ["engine died failed"]
    await told.lifecycle.free()


Handlers = dict[str, Callable[..., Awaitable[Any]]]


class Straw:
    """`FrontendProcesses` whose processes do nothing; a test answers for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[Handlers] = [{"tokens": nothing}, {"tokens": nothing}]
        self.peers: list[Peer] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._ends: list[socket.socket] = []
        monkeypatch.setattr(module, "_spawn", self._spawn)
        for seconds in ("_ANSWER_SECONDS", "_DETACH_SECONDS", "_ATTACH_SECONDS"):
            monkeypatch.setattr(module, seconds, 0.3)
        monkeypatch.setattr(module, "_NUMBERS_SECONDS", 0.3)
        monkeypatch.setattr(module, "_DEATH_SECONDS", 0.2)
        monkeypatch.setattr(module, "_PULSE_SECONDS", 0.2)
        self.ending = Ending()
        self.lifecycle = Lifecycle(self.ending, shutdown_timeout=1.0)
        self.frontends = FrontendProcesses(Settings(addr="127.0.0.1:0", frontends=3))
        self._tasks: list[asyncio.Task[None]] = []

    def _spawn(self, _start: Any) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        ours, its = socket.socketpair()
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.processes.append(process)
        self._ends.append(its)
        return process, ours

    async def begin(self) -> None:
        await self.frontends.start("127.0.0.1:1", self.lifecycle)
        for its, answers in zip(self._ends, self.answers, strict=True):
            peer = Peer(its, answers)
            await peer.open()
            self.peers.append(peer)
            self._tasks.append(asyncio.create_task(peer.run()))

    async def end(self) -> None:
        await self.frontends.stop(0)
        assert [process.poll() is None for process in self.processes] == [False, False]
        for peer in self.peers:
            peer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        private_folders.remove_all()


async def never(*_: Any) -> None:
    await asyncio.Event().wait()


async def nothing(*_: Any) -> None:
    return


@pytest.fixture
async def straw(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Straw]:
    straw = Straw(monkeypatch)
    await straw.begin()
    yield straw
    await straw.end()


async def refused(_seat: bytes) -> None:
    raise ValueError("no tokenizer")


async def test_a_load_fails_where_one_can_not_be_attached(straw: Straw) -> None:
    straw.answers[0]["attach"], straw.answers[1]["attach"] = nothing, refused
    pid = straw.processes[1].pid
    text = rf"frontend 3 \(process {pid}\) could not become a client of the engine: ValueError: no tokenizer"
    with pytest.raises(LoadFailed, match=text):
        await straw.frontends.attach([b"2", b"3"])
    assert straw.lifecycle.state is State.NO_MODEL


async def test_one_that_does_not_answer_is_killed_and_named(straw: Straw) -> None:
    straw.answers[0]["detach"], straw.answers[1]["detach"] = nothing, never
    await straw.frontends.detach()
    cause = await asyncio.wait_for(straw.ending.asked(), 5)
    assert cause == f"frontend 3 (process {straw.processes[1].pid}) did not answer within 0.3 s (detach)"


async def test_one_that_does_not_become_a_client_is_killed_and_named(straw: Straw) -> None:
    straw.answers[0]["attach"], straw.answers[1]["attach"] = nothing, never
    text = "did not become a client of the engine within 0.3 s"
    with pytest.raises(LoadFailed, match=text):
        await straw.frontends.attach([b"2", b"3"])
    cause = await asyncio.wait_for(straw.ending.asked(), 5)
    assert cause == f"frontend 3 (process {straw.processes[1].pid}) {text}"


async def test_one_that_hangs_without_being_asked_for_anything_is_found(
    monkeypatch: pytest.MonkeyPatch, straw: Straw
) -> None:
    straw.answers[0]["tokens"], straw.answers[1]["tokens"] = nothing, never
    monkeypatch.setattr(module, "_PULSE_ANSWER_SECONDS", 0.3)
    cause = await asyncio.wait_for(straw.ending.asked(), 5)
    assert cause == f"frontend 3 (process {straw.processes[1].pid}) did not answer within 0.3 s (tokens)"


async def test_an_answer_that_came_while_this_process_was_stopped_counts(straw: Straw) -> None:
    straw.answers[0]["open"] = straw.answers[1]["open"] = nothing
    opening = asyncio.create_task(straw.frontends.open("m"))
    await asyncio.sleep(0.01)
    time.sleep(0.5)  # noqa: ASYNC251  # as SIGSTOP would
    await opening
    assert straw.lifecycle.state is State.NO_MODEL
    assert [process.poll() for process in straw.processes] == [None, None]


async def test_numbers_of_those_that_answer(straw: Straw) -> None:
    async def tokens() -> Tokens:
        return Tokens(1, 2, 3.0)

    async def snapshot() -> bytes:
        return b"numbers"

    straw.answers[0].update(tokens=tokens, snapshot=snapshot)
    straw.answers[1].update(tokens=never, snapshot=snapshot)
    assert await straw.frontends.tokens() == [Tokens(1, 2, 3.0)]
    straw.answers[0]["tokens"] = never
    assert await straw.frontends.tokens() == [Tokens(1, 2, 3.0)]
    assert await straw.frontends.snapshots() == [b"numbers"] * 2
    # A counter must not fall because one is late.
    straw.answers[1]["snapshot"] = never
    assert await straw.frontends.snapshots() == [b"numbers"] * 2
    assert straw.lifecycle.state is State.NO_MODEL


async def test_a_client_that_fails_while_the_engine_lives_ends_the_process(straw: Straw) -> None:
    told = await straw.peers[0].ask("explain", True, "KeyError in the engine's output handler (x.py:1)")
    assert told == "frontend 2: KeyError in the engine's output handler (x.py:1)"
    assert await straw.ending.asked() == told


async def test_what_nobody_knows_better_stays_as_it_is(straw: Straw) -> None:
    assert await straw.peers[0].ask("explain", True, None) is None
    straw.lifecycle.drain()
    assert await straw.peers[0].ask("explain", True, None) == "the server is shutting down"
    assert await straw.peers[0].ask("explain", False, None) is None


def test_a_temporary_folder_where_nothing_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", f"{tmp_path}/missing")
    with pytest.raises(SettingsError, match=r"no folder can be made in .*/missing: No such file or directory"):
        make()
