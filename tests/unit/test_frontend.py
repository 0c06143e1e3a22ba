"""A frontend's side: what it serves itself, and what it does when it is told; the model is of straw."""

import asyncio
import types
from typing import Any, cast

import pytest

from backend.counters import Counters
from backend.frontend import Frontend
from backend.merging import read
from backend.peer import Peer, PeerGone
from common.errors import EngineGone, IdentityMismatch, InvalidRequest, ModelNotLoaded, Unsupported
from common.frontends import Tokens


class Straw:
    """A model at an engine of another process."""

    hold = asyncio.Event()

    def __init__(self) -> None:
        self.dead = False
        self.closed = False
        self.scheduled_at = {0: 1.5}

    @classmethod
    async def join(cls, seat: bytes) -> "Straw":
        if seat == b"slow":
            await cls.hold.wait()
        return cls()

    async def cause_of_death(self) -> str:
        return "KeyError in the engine's output handler"

    async def close(self, timeout: float) -> None:
        assert timeout == 0
        self.closed = True

    def lose(self) -> None:
        self.dead = True

    def tokens(self) -> Tokens:
        return Tokens(1, 2, 3.0)


class Main:
    """The other end of the socket pair."""

    def __init__(self, answer: str | None = None, *, gone: bool = False) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._answer, self._gone = answer, gone

    async def ask(self, *what: Any) -> str | None:
        self.asked.append(what)
        if self._gone:
            raise PeerGone
        return self._answer


@pytest.fixture
async def frontend() -> Frontend:
    frontend = Frontend(None)
    frontend.warm.set_result(types.SimpleNamespace(Model=Straw))
    return frontend


async def test_it_serves_from_open_to_idle(frontend: Frontend) -> None:
    with pytest.raises(ModelNotLoaded):
        frontend.model_for("")
    await frontend.open("a")
    assert not frontend.is_open()
    await frontend.attach(b"")
    assert not frontend.is_open()
    await frontend.open("a")
    assert frontend.is_open()
    frontend.model_for("a")
    frontend.model_for("")
    with pytest.raises(IdentityMismatch, match="model identity mismatch"):
        frontend.model_for("b")


async def test_idle_closes_at_once_and_waits_for_the_requests(frontend: Frontend) -> None:
    await frontend.attach(b"")
    await frontend.open("a")
    done = asyncio.Event()

    async def request() -> None:
        frontend.model_for("")
        await done.wait()

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    idle = asyncio.create_task(frontend.idle())
    await asyncio.sleep(0.01)
    assert not frontend.is_open()
    assert not idle.done()
    done.set()
    await asyncio.wait_for(idle, 1)
    await task


async def test_detach_closes_the_model(frontend: Frontend) -> None:
    await frontend.attach(b"")
    await frontend.open("a")
    model = cast("Any", frontend.model_for(""))
    assert await frontend.tokens() == Tokens(1, 2, 3.0)
    await frontend.detach()
    assert model.closed
    assert not frontend.is_open()
    assert await frontend.tokens() is None
    await frontend.detach()


@pytest.mark.parametrize("imported", [True, False])
async def test_detach_gives_up_a_client_that_is_half_made(imported: bool) -> None:
    frontend = Frontend(None)
    if imported:
        frontend.warm.set_result(types.SimpleNamespace(Model=Straw))
    attaching = asyncio.create_task(frontend.attach(b"slow"))
    await asyncio.sleep(0.01)
    await asyncio.wait_for(frontend.detach(), 1)
    with pytest.raises(asyncio.CancelledError):
        await attaching
    assert await frontend.tokens() is None
    # The import goes on, and so does the next load.
    if not imported:
        frontend.warm.set_result(types.SimpleNamespace(Model=Straw))
    await frontend.attach(b"")
    assert await frontend.tokens() is not None


async def test_the_main_process_is_asked_why(frontend: Frontend) -> None:
    await frontend.attach(b"")
    main = Main("the engine died: no memory")
    frontend.peer = cast("Peer", main)
    for error in (EngineGone("x"), InvalidRequest("Prompt", "is odd")):
        explanation = await frontend.explained(error)
        assert isinstance(explanation, EngineGone)
        assert str(explanation) == "the engine died: no memory"
    assert main.asked == [("explain", True, None), ("explain", False, None)]
    refusal = Unsupported("no")
    assert await frontend.explained(refusal) is refusal
    assert len(main.asked) == 2


@pytest.mark.parametrize("main", [Main(None), Main(gone=True)])
async def test_what_it_does_not_know_either(frontend: Frontend, main: Main) -> None:
    frontend.peer = cast("Peer", main)
    error = RuntimeError()
    assert await frontend.explained(error) is error


async def test_a_model_that_has_gone_from_under_a_request(frontend: Frontend) -> None:
    await frontend.attach(b"")
    await frontend.open("a")
    frontend.model_for("")
    frontend.peer = cast("Peer", Main(None))
    error = RuntimeError()
    assert await frontend.explained(error) is error
    await frontend.detach()
    found = await frontend.explained(error)
    assert isinstance(found, EngineGone)
    assert str(found) == "the engine is being shut down"


async def test_its_own_client_that_fails_is_reported_without_a_request(frontend: Frontend) -> None:
    await frontend.attach(b"")
    main = Main("frontend 2: x")
    frontend.peer = cast("Peer", main)
    watching = asyncio.create_task(frontend.watch())
    frontend.model_for("").lose()
    await asyncio.sleep(0.7)
    assert main.asked == []  # while it is no business of its own
    await frontend.open("")
    await asyncio.sleep(0.7)
    watching.cancel()
    assert main.asked == [("explain", True, "KeyError in the engine's output handler")]


async def test_its_numbers() -> None:
    counters = Counters()
    counters.completion_tokens = 7
    frontend = Frontend(counters)
    frontend.warm.set_result(types.SimpleNamespace(Model=Straw))
    await frontend.attach(b"")
    (snapshot,) = read([await frontend.snapshot()])
    assert (snapshot.counters.completion_tokens, snapshot.scheduled_at) == (7, {0: 1.5})
