"""Who may load, free and end what, and when; a fake takes the engine's place."""

import asyncio
import dataclasses
import logging
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from backend.ending import Ending
from backend.lifecycle import Lifecycle, State
from common.admission import Limits
from common.errors import (
    EngineGone,
    IdentityMismatch,
    InvalidRequest,
    LoadCancelled,
    LoadFailed,
    ModelNotLoaded,
    Unsupported,
)
from common.frontends import Alone
from common.pb import backend_pb2 as pb


@dataclasses.dataclass(frozen=True)
class Plan:
    model: str
    engine_args: dict[str, Any]


class FakeModel:
    """A model whose load and close a test can hold up; `alive` and `most_alive` count them."""

    hold_load: asyncio.Event
    hold_close: asyncio.Event
    alive: int
    most_alive: int
    events: list[str]

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.dead = False

    async def cause_of_death(self) -> str:
        return "ValueError: gone"

    @classmethod
    async def load(cls, plan: Plan, clock: Any, _frontends: Any) -> "FakeModel":
        clock.enter("loading weights")
        cls.events.append(f"load {plan.model}")
        cls.alive += 1
        cls.most_alive = max(cls.most_alive, cls.alive)
        try:
            await cls.hold_load.wait()
        except asyncio.CancelledError:
            cls.alive -= 1
            cls.events.append(f"gave up {plan.model}")
            raise
        if plan.model == "broken":
            cls.alive -= 1
            raise LoadFailed("ValueError: no memory")
        return cls(plan)

    async def close(self, timeout: float) -> None:
        type(self).events.append(f"close {self.plan.model} {timeout}")
        await type(self).hold_close.wait()
        type(self).alive -= 1
        type(self).events.append(f"closed {self.plan.model}")


def plan_load(options: pb.ModelOptions, _limits: Limits, *, scraped: bool) -> Plan:
    if options.Model == "odd":
        raise InvalidRequest("Model", "is odd")
    if options.Embeddings:
        raise Unsupported("no embeddings")
    if options.Model == "bug":
        raise ZeroDivisionError
    return Plan(options.Model, {"max_model_len": options.MaxModelLen})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeModel]:
    """`common.model` is this class and `plan_load` now."""
    FakeModel.hold_load, FakeModel.hold_close = asyncio.Event(), asyncio.Event()
    FakeModel.hold_load.set()
    FakeModel.hold_close.set()
    FakeModel.alive = FakeModel.most_alive = 0
    FakeModel.events = []
    module = types.ModuleType("common.model")
    vars(module).update(Model=FakeModel, plan_load=plan_load)
    monkeypatch.setitem(sys.modules, "common.model", module)
    return FakeModel


@pytest.fixture
async def ending() -> Ending:  # its future is the loop's
    return Ending()


@pytest.fixture
async def lifecycle(fake: type[FakeModel], ending: Ending) -> AsyncIterator[Lifecycle]:
    lifecycle = Lifecycle(ending, shutdown_timeout=3.0)
    lifecycle.import_in_background()
    yield lifecycle
    fake.hold_load.set()
    fake.hold_close.set()
    await asyncio.wait_for(lifecycle.free(), 5)
    assert fake.alive == 0
    assert fake.most_alive <= 1, "two engines at a time"


@pytest.fixture
async def watching(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The engine is looked at all the time."""
    monkeypatch.setattr("backend.lifecycle._WATCH_INTERVAL", 0.005)
    task = asyncio.create_task(lifecycle.watch())
    yield
    task.cancel()


def options(model: str = "a", **fields: Any) -> pb.ModelOptions:
    return pb.ModelOptions(Model=model, **fields)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never came true")


def state_of(lifecycle: Lifecycle) -> State:
    return lifecycle.state  # which mypy would otherwise take for what it was last compared with


async def test_the_way_of_a_model(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    assert state_of(lifecycle) is State.NO_MODEL
    with pytest.raises(ModelNotLoaded):
        lifecycle.model_for("")
    fake.hold_load.clear()
    loading = asyncio.create_task(lifecycle.load(options()))
    await until(lambda: fake.events == ["load a"])
    assert state_of(lifecycle) is State.LOADING
    assert lifecycle.load_clock is not None
    assert lifecycle.load_clock.stage == "loading weights"
    with pytest.raises(ModelNotLoaded):
        lifecycle.model_for("")
    fake.hold_load.set()
    await loading
    assert state_of(lifecycle) is State.READY
    assert lifecycle.load_clock is None
    assert isinstance(lifecycle.model_for("a"), fake)
    await lifecycle.free()
    assert state_of(lifecycle) is State.NO_MODEL
    assert fake.events == ["load a", "close a 3.0", "closed a"]
    with pytest.raises(ModelNotLoaded):
        lifecycle.model_for("a")
    await lifecycle.load(options())
    assert state_of(lifecycle) is State.READY


async def test_free_without_a_model(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.free()
    await lifecycle.free()
    assert fake.events == []
    assert state_of(lifecycle) is State.NO_MODEL


@pytest.mark.parametrize(("asked", "right"), [("", True), ("org/a", True), ("a", False), ("org/a ", False)])
async def test_identity(lifecycle: Lifecycle, asked: str, right: bool) -> None:
    await lifecycle.load(options("org/a"))
    if right:
        lifecycle.model_for(asked)
    else:
        with pytest.raises(IdentityMismatch, match="model identity mismatch"):
            lifecycle.model_for(asked)


async def test_without_a_name_any_identity_is_right(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options("", ModelFile="/m"))
    lifecycle.model_for("whatever")


async def test_the_identity_goes_with_the_model(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options("a"))
    await lifecycle.load(options("b"))
    lifecycle.model_for("b")
    with pytest.raises(IdentityMismatch):
        lifecycle.model_for("a")
    await lifecycle.free()
    for name in ("a", "b"):
        with pytest.raises(ModelNotLoaded):
            lifecycle.model_for(name)


async def test_the_same_options_change_nothing(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options(MaxModelLen=5))
    model = lifecycle.model_for("")
    await lifecycle.load(options(MaxModelLen=5))
    assert lifecycle.model_for("") is model
    assert fake.events == ["load a"]
    assert state_of(lifecycle) is State.READY


async def test_a_model_is_served_while_its_options_are_compared(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options())
    again = asyncio.create_task(lifecycle.load(options()))
    while not again.done():
        lifecycle.model_for("a")
        assert state_of(lifecycle) is State.READY
        await asyncio.sleep(0)


async def test_other_options_close_the_first_model_first(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options(MaxModelLen=5))
    await lifecycle.load(options(MaxModelLen=6))
    assert fake.events == ["load a", "close a 3.0", "closed a", "load a"]
    assert lifecycle.model_for("").plan.engine_args == {"max_model_len": 6}


async def test_a_dead_model_is_replaced_by_the_same(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options())
    vars(lifecycle.model_for(""))["dead"] = True
    await lifecycle.load(options())
    assert fake.events == ["load a", "close a 3.0", "closed a", "load a"]


async def test_a_second_load_waits(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    loads = [asyncio.create_task(lifecycle.load(options(name))) for name in "abb"]
    await until(lambda: fake.events == ["load a"])
    await asyncio.sleep(0.01)
    assert fake.events == ["load a"]
    fake.hold_load.set()
    await asyncio.gather(*loads)
    assert fake.events == ["load a", "close a 3.0", "closed a", "load b"]
    lifecycle.model_for("b")


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (options("odd"), InvalidRequest),
        (options(Embeddings=True), Unsupported),
        (options("bug"), ZeroDivisionError),
        (options("broken"), LoadFailed),
    ],
    ids=lambda value: value.Model if isinstance(value, pb.ModelOptions) else "",
)
async def test_failure_then_success(lifecycle: Lifecycle, bad: pb.ModelOptions, error: type[Exception]) -> None:
    for _ in range(2):
        with pytest.raises(error):
            await lifecycle.load(bad)
        assert state_of(lifecycle) is State.NO_MODEL
        assert lifecycle.load_clock is None
        with pytest.raises(ModelNotLoaded):
            lifecycle.model_for("")
    await lifecycle.load(options())
    lifecycle.model_for("a")


@pytest.mark.parametrize("bad", [options("odd"), options(Embeddings=True), options("bug")], ids=lambda bad: bad.Model)
async def test_options_that_cannot_be_used_leave_the_model(lifecycle: Lifecycle, bad: pb.ModelOptions) -> None:
    await lifecycle.load(options())
    with pytest.raises((InvalidRequest, Unsupported, ZeroDivisionError)):
        await lifecycle.load(bad)
    assert state_of(lifecycle) is State.READY
    lifecycle.model_for("a")


async def test_a_load_that_fails_leaves_no_model(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options())
    with pytest.raises(LoadFailed, match="ValueError: no memory"):
        await lifecycle.load(options("broken"))
    assert state_of(lifecycle) is State.NO_MODEL
    for name in ("", "a", "broken"):
        with pytest.raises(ModelNotLoaded):
            lifecycle.model_for(name)


async def test_a_caller_who_goes_away_cancels_the_load(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    loading = asyncio.create_task(lifecycle.load(options()))
    await until(lambda: fake.events == ["load a"])
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert fake.events == ["load a", "gave up a"]
    assert state_of(lifecycle) is State.NO_MODEL
    fake.hold_load.set()
    await lifecycle.load(options())
    assert state_of(lifecycle) is State.READY


async def test_a_caller_who_goes_away_while_waiting(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    first, second = (asyncio.create_task(lifecycle.load(options(name))) for name in "ab")
    await until(lambda: fake.events == ["load a"])
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    fake.hold_load.set()
    await first
    assert fake.events == ["load a"]
    lifecycle.model_for("a")


async def test_the_next_load_runs_when_the_first_caller_goes_away(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    first, second = (asyncio.create_task(lifecycle.load(options(name))) for name in "ab")
    await until(lambda: fake.events == ["load a"])
    first.cancel()
    fake.hold_load.set()
    await second
    assert first.cancelled()
    lifecycle.model_for("b")


async def test_free_cancels_a_load(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    loading = asyncio.create_task(lifecycle.load(options()))
    await until(lambda: fake.events == ["load a"])
    await asyncio.wait_for(lifecycle.free(), 5)
    with pytest.raises(LoadCancelled):
        await loading
    assert fake.events == ["load a", "gave up a"]
    assert state_of(lifecycle) is State.NO_MODEL


async def test_free_cancels_a_load_before_the_import_is_done(fake: type[FakeModel]) -> None:
    lifecycle = Lifecycle(Ending(), shutdown_timeout=3.0)
    loading = asyncio.create_task(lifecycle.load(options()))
    await until(lambda: state_of(lifecycle) is State.LOADING)
    assert lifecycle.load_clock is not None
    assert lifecycle.load_clock.stage == "importing vLLM"
    await asyncio.wait_for(lifecycle.free(), 5)
    with pytest.raises(LoadCancelled):
        await loading
    lifecycle.import_in_background()
    await lifecycle.load(options())
    await lifecycle.free()


async def test_free_does_not_wait_for_the_loads_that_wait(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    loads = [asyncio.create_task(lifecycle.load(options(name))) for name in "abc"]
    await until(lambda: fake.events == ["load a"])
    await asyncio.wait_for(lifecycle.free(), 1)
    results = await asyncio.wait_for(asyncio.gather(*loads, return_exceptions=True), 1)
    assert [type(result) for result in results] == [LoadCancelled] * 3
    assert state_of(lifecycle) is State.NO_MODEL


async def test_free_waits_until_a_model_that_is_being_replaced_is_closed(
    lifecycle: Lifecycle, fake: type[FakeModel]
) -> None:
    await lifecycle.load(options("a"))
    fake.hold_close.clear()
    loading = asyncio.create_task(lifecycle.load(options("b")))
    await until(lambda: "close a 3.0" in fake.events)
    freeing = asyncio.create_task(lifecycle.free())
    await asyncio.sleep(0.02)
    assert not freeing.done()
    fake.hold_close.set()
    await freeing
    with pytest.raises(LoadCancelled):
        await loading
    assert fake.events == ["load a", "close a 3.0", "closed a"]
    assert state_of(lifecycle) is State.NO_MODEL


async def test_a_free_whose_caller_goes_away_runs_to_its_end(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options("a"))
    fake.hold_close.clear()
    freeing = asyncio.create_task(lifecycle.free())
    await until(lambda: "close a 3.0" in fake.events)
    freeing.cancel()
    with pytest.raises(ModelNotLoaded):
        lifecycle.model_for("a")
    loading = asyncio.create_task(lifecycle.load(options("b")))
    await asyncio.sleep(0.02)
    assert "load b" not in fake.events
    fake.hold_close.set()
    await loading
    assert fake.events == ["load a", "close a 3.0", "closed a", "load b"]
    assert state_of(lifecycle) is State.READY


async def test_draining_refuses_requests_and_loads(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options())
    lifecycle.drain()
    assert state_of(lifecycle) is State.DRAINING
    with pytest.raises(EngineGone):
        lifecycle.model_for("a")
    with pytest.raises(EngineGone):
        await lifecycle.load(options("b"))
    assert fake.events == ["load a"]
    await lifecycle.free()
    assert fake.alive == 0
    assert state_of(lifecycle) is State.DRAINING


async def test_draining_gives_up_all_loads(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    fake.hold_load.clear()
    first, second = (asyncio.create_task(lifecycle.load(options(name))) for name in "ab")
    await until(lambda: fake.events == ["load a"])
    lifecycle.drain()
    for load in (first, second):
        with pytest.raises((LoadCancelled, EngineGone)):
            await load
    await asyncio.wait_for(lifecycle.free(), 5)
    assert fake.events == ["load a", "gave up a"]
    assert state_of(lifecycle) is State.DRAINING


async def test_draining_while_a_model_is_replaced_leaves_none(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options("a"))
    fake.hold_close.clear()
    loading = asyncio.create_task(lifecycle.load(options("b")))
    await until(lambda: "close a 3.0" in fake.events)
    lifecycle.drain()
    fake.hold_close.set()
    with pytest.raises(LoadCancelled):
        await loading
    await lifecycle.free()
    assert fake.events == ["load a", "close a 3.0", "closed a"]
    assert state_of(lifecycle) is State.DRAINING


async def test_a_dead_engine_ends_the_process(lifecycle: Lifecycle, ending: Ending, watching: None) -> None:
    await lifecycle.load(options())
    asked = asyncio.create_task(ending.asked())
    await asyncio.sleep(0.03)
    assert not asked.done()
    vars(lifecycle.model_for(""))["dead"] = True
    cause = await asyncio.wait_for(asked, 5)
    assert cause is not None
    assert "ValueError: gone" in cause
    assert state_of(lifecycle) is State.FAILED
    with pytest.raises(EngineGone):
        lifecycle.model_for("a")
    with pytest.raises(EngineGone):
        await lifecycle.load(options("b"))
    lifecycle.drain()
    assert state_of(lifecycle) is State.FAILED


async def test_a_death_whose_cause_cannot_be_looked_for_ends_the_process(
    lifecycle: Lifecycle,
    ending: Ending,
    watching: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem = OSError(24, "Too many open files")

    async def cause_of_death(_model: FakeModel) -> str:
        raise problem

    monkeypatch.setattr(FakeModel, "cause_of_death", cause_of_death)
    await lifecycle.load(options())
    vars(lifecycle.model_for(""))["dead"] = True
    assert await asyncio.wait_for(ending.asked(), 5) == "the engine died: OSError where the cause was looked for"
    assert "OSError" in caplog.text
    assert __file__ in caplog.text
    assert "Too many" not in caplog.text


async def test_the_others_hear_of_a_death_in_a_drain(
    fake: type[FakeModel], ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    over = asyncio.Event()

    class Others(Alone):
        async def idle(self) -> None:
            await over.wait()

        async def engine_died(self) -> None:
            told.append("engine_died")
            over.set()

    monkeypatch.setattr("backend.lifecycle._WATCH_INTERVAL", 0.005)
    lifecycle = Lifecycle(ending, shutdown_timeout=3.0, frontends=Others())
    lifecycle.import_in_background()
    await lifecycle.load(options())
    lifecycle.drain()
    idle = asyncio.create_task(lifecycle.idle())
    await asyncio.sleep(0.03)
    assert not told
    vars(lifecycle)["_model"].dead = True
    await asyncio.wait_for(idle, 5)
    assert told == ["engine_died"]
    await lifecycle.free()


async def test_the_others_hear_once_of_a_death_before_a_drain(fake: type[FakeModel], ending: Ending) -> None:
    told: list[str] = []

    class Others(Alone):
        async def idle(self) -> None:
            await asyncio.sleep(0.03)

        async def engine_died(self) -> None:
            told.append("engine_died")

    lifecycle = Lifecycle(ending, shutdown_timeout=3.0, frontends=Others())
    lifecycle.import_in_background()
    await lifecycle.load(options())
    vars(lifecycle)["_model"].dead = True
    await lifecycle.explained(EngineGone("aborted"))
    lifecycle.drain()
    await asyncio.wait_for(lifecycle.idle(), 5)
    assert told == ["engine_died"]
    await lifecycle.free()


async def test_nothing_watches_the_engine_for_the_others_after_a_drain(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options())
    lifecycle.drain()
    await asyncio.wait_for(lifecycle.idle(), 5)
    await asyncio.sleep(0)
    assert not [task for task in asyncio.all_tasks() if "_watch_for_the_others" in repr(task)]


async def test_an_engine_that_dies_while_other_options_are_read_gets_no_successor(
    lifecycle: Lifecycle, ending: Ending, watching: None, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    await lifecycle.load(options())
    reading, go_on = threading.Event(), threading.Event()

    def plan_load(options: pb.ModelOptions, _limits: Limits, *, scraped: bool) -> Plan:
        reading.set()
        assert go_on.wait(5)
        return Plan(options.Model, {})

    monkeypatch.setattr(sys.modules["common.model"], "plan_load", plan_load)
    loading = asyncio.create_task(lifecycle.load(options("b")))
    await until(reading.is_set)
    vars(lifecycle.model_for(""))["dead"] = True
    await until(lambda: state_of(lifecycle) is State.FAILED)
    go_on.set()
    with pytest.raises(EngineGone):
        await loading
    assert state_of(lifecycle) is State.FAILED
    assert "load b" not in fake.events
    assert await asyncio.wait_for(ending.asked(), 5) == "the engine died: ValueError: gone"


async def test_an_engine_that_dies_while_it_is_replaced_gets_no_successor(
    lifecycle: Lifecycle, fake: type[FakeModel]
) -> None:
    """As the process ends for another reason, such as a frontend's death."""
    await lifecycle.load(options())
    fake.hold_close.clear()
    loading = asyncio.create_task(lifecycle.load(options("b")))
    await until(lambda: fake.events[-1].startswith("close a"))
    lifecycle.fail("a frontend is gone")
    fake.hold_close.set()
    with pytest.raises(EngineGone):
        await loading
    assert state_of(lifecycle) is State.FAILED
    assert "load b" not in fake.events


async def test_what_a_caller_hears_of_a_death(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options())
    gone, other = EngineGone("aborted"), ModelNotLoaded()
    assert await lifecycle.explained(gone) is gone
    await lifecycle.check_health()
    vars(lifecycle.model_for(""))["dead"] = True
    # vLLM's exceptions that end an output handler may look like a bad request.
    for error in (gone, ZeroDivisionError(), InvalidRequest("Messages", "int too big")):
        found = await lifecycle.explained(error)
        assert isinstance(found, EngineGone)
        assert str(found) == "the engine died: ValueError: gone"
    assert await lifecycle.explained(other) is other
    assert state_of(lifecycle) is State.FAILED
    with pytest.raises(EngineGone, match="the engine died: ValueError: gone"):
        await lifecycle.check_health()


async def test_what_a_caller_hears_of_a_shutdown(lifecycle: Lifecycle) -> None:
    await lifecycle.load(options())
    vars(lifecycle.model_for(""))["dead"] = True
    lifecycle.drain()
    assert str(await lifecycle.explained(EngineGone("the engine died"))) == "the server is shutting down"
    await lifecycle.check_health()


@pytest.mark.parametrize("successor", [None, "b"])
async def test_what_a_caller_hears_whose_model_was_unloaded(lifecycle: Lifecycle, successor: str | None) -> None:
    async def request() -> tuple[bool, list[Exception]]:
        lifecycle.model_for("")
        before = await lifecycle.explained(thread)
        serving.set()
        await unloaded.wait()
        return before is thread, [await lifecycle.explained(error) for error in (thread, died, odd)]

    thread, died, odd = RuntimeError("after shutdown"), EngineGone("died"), InvalidRequest("Prompt", "is odd")
    serving, unloaded = asyncio.Event(), asyncio.Event()
    await lifecycle.load(options())
    asking = asyncio.create_task(request())
    await serving.wait()
    await (lifecycle.free() if successor is None else lifecycle.load(options(successor)))
    unloaded.set()
    unchanged, (*gone, other) = await asking
    assert unchanged
    assert [str(error) for error in gone if isinstance(error, EngineGone)] == ["the engine is being shut down"] * 2
    assert other is odd
    # A request for the next one has nothing to do with that.
    assert await lifecycle.explained(thread) is thread


async def test_what_a_caller_hears_that_a_shutdown_did_not_wait_for(lifecycle: Lifecycle) -> None:
    async def request() -> Exception:
        lifecycle.model_for("")
        await unloaded.wait()
        return await lifecycle.explained(RuntimeError("after shutdown"))

    unloaded = asyncio.Event()
    await lifecycle.load(options())
    asking = asyncio.create_task(request())
    await asyncio.sleep(0)
    lifecycle.drain()
    await lifecycle.free()
    unloaded.set()
    found = await asking
    assert isinstance(found, EngineGone)
    assert str(found) == "the server is shutting down"


async def test_who_watches_hears_of_each_state_once(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    seen: list[State] = []
    lifecycle.on_state(seen.append)
    await lifecycle.load(options("a"))
    await lifecycle.load(options("a"))
    await lifecycle.load(options("b"))
    await lifecycle.free()
    lifecycle.drain()
    lifecycle.drain()
    assert [state.value for state in seen] == [
        "loading", "ready", "loading", "ready", "no model", "draining",
    ]  # fmt: skip


async def test_a_model_that_is_being_closed_is_none(lifecycle: Lifecycle, fake: type[FakeModel]) -> None:
    await lifecycle.load(options())
    fake.hold_close.clear()
    freeing = asyncio.create_task(lifecycle.free())
    await until(lambda: "close a 3.0" in fake.events)
    assert state_of(lifecycle) is State.NO_MODEL
    fake.hold_close.set()
    await freeing


@pytest.mark.parametrize("hurry", [False, True])
async def test_the_drain_waits_for_requests(lifecycle: Lifecycle, ending: Ending, hurry: bool) -> None:
    await lifecycle.load(options())
    done = asyncio.Event()

    async def request() -> None:
        lifecycle.model_for("")
        await done.wait()

    running = asyncio.create_task(request())
    await asyncio.sleep(0)
    lifecycle.drain()
    idle = asyncio.create_task(lifecycle.idle())
    await ending.wait(idle, 0.01)
    waiting = asyncio.create_task(ending.wait(idle, 60))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    if hurry:
        ending.ask()
        ending.ask()  # a second signal
    else:
        done.set()
    await asyncio.wait_for(waiting, 5)
    assert idle.done() is not hurry
    assert running.done() is not hurry
    done.set()
    await running


async def test_vllm_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "common.model", None)  # makes the import fail
    lifecycle = Lifecycle(Ending(), shutdown_timeout=3.0)
    lifecycle.import_in_background()
    for _ in range(2):
        with pytest.raises(LoadFailed, match=r"vLLM can't be imported: .*common\.model"):
            await lifecycle.load(options())
        assert state_of(lifecycle) is State.NO_MODEL
    assert "vLLM can't be imported" in caplog.text


async def test_a_token_for_the_hub_is_not_logged(
    lifecycle: Lifecycle, fake: type[FakeModel], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan("a", {"hf_token": "secret", "max_model_len": 128})
    monkeypatch.setattr(sys.modules["common.model"], "plan_load", lambda _options, _limits, **_: plan)
    with caplog.at_level(logging.DEBUG):
        await lifecycle.load(options())
    assert "128" in caplog.text
    assert "secret" not in caplog.text
