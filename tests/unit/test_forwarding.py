"""What a frontend passes on, and what becomes of it on the way: here both servers are in this process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from backend.counters import Counters
from backend.forwarding import Forwarding, connect
from backend.server import SERVICE, build_server
from backend.settings import Settings
from backend.sockets import listen
from common.errors import EngineGone, InvalidRequest, ModelNotLoaded
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.unit.test_server import FakeLifecycle

if TYPE_CHECKING:
    from backend.lifecycle import Lifecycle

SETTINGS = Settings(addr="127.0.0.1:0", auth_token="secret", frontends=2)  # noqa: S106  # a token of this test
TOKEN = (("authorization", "Bearer secret"),)


class Two:
    """A main process and a frontend of straw, and a channel to the latter."""

    def __init__(self) -> None:
        self.main, self.frontend = FakeLifecycle(), FakeLifecycle()
        self.counters = Counters()
        self.is_open = False
        self.channel: grpc.aio.Channel

    @property
    def stub(self) -> Any:
        return pb_grpc.BackendStub(self.channel)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Two]:
    two = Two()
    private = build_server(SETTINGS, cast("Lifecycle", two.main), two.counters, is_private=True)
    listen(private, f"unix:{tmp_path}/main")
    async with contextlib.AsyncExitStack() as stack:
        await private.start()
        stack.push_async_callback(private.stop, 0)
        passing = await stack.enter_async_context(connect(f"{tmp_path}/main"))
        forwarding = Forwarding(SERVICE, lambda: two.is_open, passing)
        server = build_server(SETTINGS, cast("Lifecycle", two.frontend), two.counters, forwarding)
        addr = listen(server, SETTINGS.addr)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        two.channel = await stack.enter_async_context(grpc.aio.insecure_channel(addr))
        yield two


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


async def test_requests_are_served_here_while_it_is_open_and_there_otherwise(two: Two) -> None:
    for is_open, served, other in ((True, two.frontend, two.main), (False, two.main, two.frontend)):
        two.is_open = is_open
        served.asked.clear()
        other.asked.clear()
        await two.stub.Predict(pb.PredictOptions(ModelIdentity="m"), metadata=TOKEN)
        replies = [reply async for reply in two.stub.PredictStream(pb.PredictOptions(), metadata=TOKEN)]
        assert replies
        assert (served.asked, other.asked) == (["m", ""], [])


async def test_what_only_the_main_process_knows_is_always_asked_there(two: Two) -> None:
    two.is_open = True
    assert (await two.stub.LoadModel(pb.ModelOptions(Model="x"), metadata=TOKEN)).success
    assert (await two.stub.Free(pb.HealthMessage(), metadata=TOKEN)).success
    assert [getattr(each, "Model", each) for each in two.main.asked] == ["x", "free"]
    assert two.frontend.asked == []
    two.main.health_error = EngineGone("the engine died: x")
    assert await status(two.stub.Health(pb.HealthMessage(), metadata=TOKEN)) == (
        grpc.StatusCode.UNAVAILABLE,
        "the engine died: x",
    )
    check = health_pb2_grpc.HealthStub(two.channel).Check
    answer = await check(health_pb2.HealthCheckRequest(service="backend.Backend/model"), metadata=TOKEN)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelNotLoaded(), grpc.StatusCode.FAILED_PRECONDITION),
        (InvalidRequest("Prompt", "is ß and 漢"), grpc.StatusCode.INVALID_ARGUMENT),
        (InvalidRequest("Prompt", "x" * 5000), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
@pytest.mark.parametrize("rpc", ["Predict", "PredictStream"])
async def test_a_refusal_is_the_same_here_and_there(
    two: Two, error: Exception, code: grpc.StatusCode, rpc: str
) -> None:
    two.main.error = two.frontend.error = error

    def call() -> Any:
        call = getattr(two.stub, rpc)(pb.PredictOptions(), metadata=TOKEN)
        return call if rpc == "Predict" else anext(aiter(call))

    two.is_open = True
    here = await status(call())
    two.is_open = False
    assert await status(call()) == here
    assert here[0] is code


async def test_the_token_is_looked_at_here_and_the_call_is_counted_here_once(two: Two) -> None:
    assert (await status(two.stub.Predict(pb.PredictOptions())))[0] is grpc.StatusCode.UNAUTHENTICATED
    await two.stub.Predict(pb.PredictOptions(), metadata=TOKEN)
    assert two.counters.started == {"Predict": 2}
    assert two.counters.finished == {("Predict", "UNAUTHENTICATED"): 1, ("Predict", "OK"): 1}
    assert two.main.asked == [""]


async def test_bytes_that_are_no_message_are_refused_alike(two: Two) -> None:
    ask: Any = two.channel.unary_unary(f"/{SERVICE}/Predict")
    ends = []
    for two.is_open in (True, False):
        ends.append(await status(ask(b"\xff\xff", metadata=TOKEN)))
    assert ends[0] == ends[1]
    assert ends[0][0] is grpc.StatusCode.INVALID_ARGUMENT


async def held(two: Two, options: Any, **call: Any) -> tuple[Any, "asyncio.Event"]:
    """A call that is passed on and does not end there, and what is set when it is given up there."""
    begun, left = asyncio.Event(), asyncio.Event()

    async def load(_options: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    two.main.load = load  # type: ignore[assignment, method-assign]
    answer = two.stub.LoadModel(options, metadata=TOKEN, **call)
    task = asyncio.ensure_future(answer.code())
    await asyncio.wait_for(begun.wait(), 5)
    return (answer, task), left


async def test_a_caller_that_goes_away_is_heard_of_there(two: Two) -> None:
    (answer, task), left = await held(two, pb.ModelOptions())
    answer.cancel()
    await asyncio.wait_for(left.wait(), 5)
    await task


async def test_a_deadline_holds_there(two: Two) -> None:
    (_, task), left = await held(two, pb.ModelOptions(), timeout=0.3)
    await asyncio.wait_for(left.wait(), 5)
    assert await task is grpc.StatusCode.DEADLINE_EXCEEDED
