"""`grpc.health.v1` in every state, and news of changes."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from backend.ending import Ending
from backend.health import MODEL, PROCESS
from backend.lifecycle import Lifecycle, State
from backend.server import SERVICE
from tests.unit.test_server import FakeLifecycle, connected, raw, serving, status

ANSWER = health_pb2.HealthCheckResponse
ENDING = (State.DRAINING, State.FAILED)


class Following(FakeLifecycle):
    """A lifecycle whose state a test sets, and whose listeners hear of it."""

    def become(self, state: State) -> None:
        self.state = state
        for listener in self.listeners:
            listener(state)


@pytest.fixture
def lifecycle() -> Following:
    return Following()


@pytest.fixture
async def health(lifecycle: Following) -> AsyncIterator[Any]:
    async with serving(lifecycle) as addr, connected(addr) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@contextlib.asynccontextmanager
async def watching(health: Any, service: str) -> AsyncIterator[Any]:
    """A Watch; `.read()` gives the next answer."""
    call = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=20)
    try:
        yield call
    finally:
        call.cancel()


def test_the_name_of_the_service() -> None:
    assert PROCESS == ("", SERVICE)
    assert f"{SERVICE}/model" == MODEL


@pytest.mark.parametrize("state", State)
async def test_check_list_and_watch_agree_in_every_state(health: Any, lifecycle: Following, state: State) -> None:
    lifecycle.state = state
    listed = (await health.List(health_pb2.HealthListRequest())).statuses
    assert set(listed) == {*PROCESS, MODEL}
    for service in (*PROCESS, MODEL):
        serves = state is State.READY if service == MODEL else state not in ENDING
        expected = ANSWER.SERVING if serves else ANSWER.NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == expected
        assert listed[service].status == expected
        async with watching(health, service) as call:
            assert (await call.read()).status == expected


@pytest.mark.parametrize("service", ["backend", "backend.Backend/", "Backend", "grpc.health.v1.Health", "x" * 5000])
async def test_a_name_that_is_not_known(health: Any, service: str) -> None:
    code, details = await status(health.Check(health_pb2.HealthCheckRequest(service=service)))
    assert code is grpc.StatusCode.NOT_FOUND
    assert '"backend.Backend"' in details
    async with watching(health, service) as call:
        assert (await call.read()).status == ANSWER.SERVICE_UNKNOWN


async def test_a_name_that_is_not_known_is_let_go_at_once(lifecycle: Following) -> None:
    """As any refused request, see `test_server`."""
    name = "unknown-" + "x" * 50
    data = health_pb2.HealthCheckRequest(service=name).SerializeToString()

    def kept() -> bool:
        requests = [seen for seen in gc.get_objects() if type(seen) is health_pb2.HealthCheckRequest]
        return name in {request.service for request in requests}

    gc.disable()
    try:
        async with serving(lifecycle) as addr, connected(addr) as channel:
            code, _ = await status(raw(channel, "/grpc.health.v1.Health/Check", data))
            assert code is grpc.StatusCode.NOT_FOUND
            for _ in range(100):
                if not kept():
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("kept for 5 s")
    finally:
        gc.enable()


async def test_a_watch_hears_of_each_change_of_its_own(health: Any, lifecycle: Following) -> None:
    lifecycle.state = State.NO_MODEL
    async with watching(health, MODEL) as model, watching(health, "") as process:
        assert (await model.read()).status == ANSWER.NOT_SERVING
        assert (await process.read()).status == ANSWER.SERVING
        lifecycle.become(State.LOADING)
        lifecycle.become(State.READY)
        assert (await model.read()).status == ANSWER.SERVING
        lifecycle.become(State.NO_MODEL)
        assert (await model.read()).status == ANSWER.NOT_SERVING
        lifecycle.become(State.DRAINING)
        # The first news since the beginning: loads and models are nothing to it.
        assert (await process.read()).status == ANSWER.NOT_SERVING


@pytest.mark.parametrize("state", ENDING)
async def test_watches_end_once_they_have_heard_of_the_end(health: Any, lifecycle: Following, state: State) -> None:
    async with contextlib.AsyncExitStack() as stack:
        calls = [await stack.enter_async_context(watching(health, name)) for name in (*PROCESS, MODEL, "other")]
        for call in calls:
            await call.read()
        lifecycle.become(state)
        for call in calls[:-1]:
            assert (await call.read()).status == ANSWER.NOT_SERVING
        for call in calls:
            assert (await status(call.read()))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_client_that_reads_nothing_holds_nobody_up(health: Any, lifecycle: Following) -> None:
    async with watching(health, MODEL), watching(health, MODEL) as reader:
        await reader.read()
        for _ in range(3):
            for state, expected in ((State.NO_MODEL, ANSWER.NOT_SERVING), (State.READY, ANSWER.SERVING)):
                lifecycle.become(state)
                assert (await reader.read()).status == expected


async def test_the_lifecycle_tells_its_listeners_of_changes_alone() -> None:
    lifecycle = Lifecycle(Ending(), shutdown_timeout=1)
    heard: list[State] = []
    lifecycle.on_state(heard.append)
    await lifecycle.free()
    assert heard == []
    lifecycle.drain()
    lifecycle.drain()
    assert heard == [State.DRAINING]
    await asyncio.sleep(0)
    assert lifecycle.state is State.DRAINING
