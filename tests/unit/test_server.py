"""A real server in this process, with fakes behind the service: statuses, tokens, sizes and sockets."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from backend.counters import Counters, Request, Stream
from backend.flag_values import SettingsError
from backend.lifecycle import Lifecycle, State
from backend.logs import TextFormatter
from backend.server import SERVICE, build_server
from backend.settings import MIB, Settings
from backend.sockets import listen
from backend.tls import server_credentials
from common import errors, request_context
from common.engine_log import StageClock
from common.observation import Observer
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc

ROOT = Path(__file__).resolve().parents[2]
WORD = "correct-horse"  # what clients must know where one is set
NOTHING = pb.HealthMessage()
METHODS = pb.DESCRIPTOR.services_by_name["Backend"].methods
UNSERVED = "AudioTranscriptionLive"
SERVED = {method.name for method in METHODS} - {UNSERVED}
# What the model does for an RPC, its request, and its reply.
ROOMS: dict[str, tuple[str, Any, Any]] = {
    "Embedding": ("embed", pb.PredictOptions(Embeddings="a", ModelIdentity="m"), pb.EmbeddingResult(dim=1)),
    "Rerank": ("rerank", pb.RerankRequest(query="a", ModelIdentity="m"), pb.RerankResult(usage=pb.Usage())),
    "Score": ("score", pb.ScoreRequest(prompt="a", ModelIdentity="m"), pb.ScoreResponse()),
    "TokenClassify": (
        "classify_tokens",
        pb.TokenClassifyRequest(text="a", ModelIdentity="m"),
        pb.TokenClassifyResponse(entities=[pb.TokenClassifyEntity(text="a")]),
    ),
    "AudioTranscription": (
        "transcribe",
        pb.TranscriptRequest(dst="a", ModelIdentity="m"),
        pb.TranscriptResult(text="a"),
    ),
    "AudioTranscriptionStream": (
        "transcribe_stream",
        pb.TranscriptRequest(dst="a", ModelIdentity="m"),
        pb.TranscriptStreamResponse(delta="a"),
    ),
    "GetMetrics": ("metrics", pb.MetricsRequest(), pb.MetricsResponse(tokens_generated=1)),
    "ModelMetadata": ("metadata", pb.ModelOptions(), pb.ModelMetadataResponse(supports_thinking=True)),
}


STREAMS = 20
# Reads one message of each stream, and ends without a word while the others wait for it to read more.
LEAVING = """
import asyncio, os, sys
import grpc
from common.pb import backend_pb2 as pb, backend_pb2_grpc as pb_grpc

async def main():
    backend = pb_grpc.BackendStub(grpc.aio.insecure_channel(sys.argv[1]))
    streams = [backend.PredictStream(pb.PredictOptions()) for _ in range(int(sys.argv[2]))]
    await asyncio.gather(*(stream.read() for stream in streams))
    await asyncio.sleep(0.2)
    os._exit(0)

asyncio.run(main())
"""


class FakeModel:
    """Answers at once, with what a test sets."""

    def __init__(self) -> None:
        self.traced = False
        self.observers: list[Observer | None] = []
        self.traces: list[Mapping[str, str] | None] = []
        self.error: Exception | None = None
        self.error_after = 0
        self.replies = [pb.Reply(message=b"a"), pb.Reply(message=b"b"), pb.Reply(tokens=2)]
        self.hold: asyncio.Event | None = None
        self.closed_streams = 0
        self.requests: list[Any] = []

    def _check(self, request: Any) -> None:
        self.requests.append(request)
        self.traces.append(request_context.trace_headers.get())
        if self.error is not None:
            raise self.error

    async def predict(self, request: pb.PredictOptions, observer: Observer | None) -> pb.Reply:
        self.observers.append(observer)
        self._check(request)
        return self.replies[0]

    async def predict_stream(self, request: pb.PredictOptions, observer: Observer | None) -> AsyncIterator[pb.Reply]:
        self.observers.append(observer)
        try:
            for number, reply in enumerate(self.replies):
                if number == self.error_after:
                    self._check(request)
                yield reply
                if self.hold is not None:
                    await self.hold.wait()
        finally:
            self.closed_streams += 1

    async def tokenize(self, request: pb.PredictOptions) -> pb.TokenizationResponse:
        self._check(request)
        return pb.TokenizationResponse(length=2, tokens=[5, 6])

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        self._check(request)
        return pb.DetokenizeResponse(content="text")

    async def transcribe_stream(self, request: pb.TranscriptRequest) -> AsyncIterator[pb.TranscriptStreamResponse]:
        self._check(request)
        yield ROOMS["AudioTranscriptionStream"][2]

    def __getattr__(self, name: str) -> Any:
        reply = next(reply for room, _, reply in ROOMS.values() if room == name)

        async def answer(*requests: Any) -> Any:
            self._check(*requests or (None,))
            return reply

        return answer


class FakeLifecycle:
    """Has a model, or an error, whatever is asked for."""

    def __init__(self) -> None:
        self.state = State.READY
        self.load_clock: StageClock | None = None
        self.model = FakeModel()
        self.error: Exception | None = None
        self.health_error: Exception | None = None
        self.explanation: Exception | None = None
        self.asked: list[Any] = []
        self.memory: dict[str, int] = {}
        self.listeners: list[Callable[[State], None]] = []

    async def explained(self, error: Exception) -> Exception:
        return self.explanation or error

    def rpc_begun(self) -> None:
        return

    async def check_health(self) -> None:
        if self.health_error is not None:
            raise self.health_error

    def model_for(self, identity: str) -> FakeModel:
        self.asked.append(identity)
        if self.error is not None:
            raise self.error
        return self.model

    async def load(self, options: pb.ModelOptions) -> None:
        self.asked.append(options)
        if self.error is not None:
            raise self.error

    def engine_memory(self) -> dict[str, int]:
        return self.memory

    def on_state(self, listener: Callable[[State], None]) -> None:
        self.listeners.append(listener)

    async def free(self) -> None:
        self.asked.append("free")
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def serving(lifecycle: FakeLifecycle, counters: Counters | None = None, **settings: Any) -> AsyncIterator[str]:
    """The address of a server that runs."""
    full = Settings(**{"addr": "127.0.0.1:0"} | settings)
    server = build_server(full, cast("Lifecycle", lifecycle), counters)
    addr = listen(server, full.addr, server_credentials(full.tls) if full.tls else None)
    await server.start()
    try:
        yield addr
    finally:
        await server.stop(0)


@pytest.fixture
def lifecycle() -> FakeLifecycle:
    return FakeLifecycle()


@pytest.fixture
async def channel(lifecycle: FakeLifecycle) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to a server without a token."""
    async with serving(lifecycle) as addr, connected(addr) as channel:
        yield channel


@pytest.fixture
def backend(channel: grpc.aio.Channel) -> Any:
    """The service; the stub's types are those of blocking calls."""
    return pb_grpc.BackendStub(channel)


def connected(addr: str, **options: int) -> grpc.aio.Channel:
    limits = {"grpc.max_send_message_length": -1, "grpc.max_receive_message_length": -1} | options
    return grpc.aio.insecure_channel(addr, options=list(limits.items()))


async def read(call: Any) -> list[pb.Reply]:
    return [reply async for reply in call]


def request_of(name: str) -> Any:
    return getattr(pb, next(method for method in METHODS if method.name == name).input_type.name)()


async def call(channel: grpc.aio.Channel, name: str, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
    """Call any method of the service; the reply, or the replies."""
    method = next(method for method in METHODS if method.name == name)
    stub: Any = getattr(pb_grpc.BackendStub(channel), name)
    request = request_of(name)
    if method.client_streaming:
        # Nothing is sent: a write that meets the end of the call would hide its status.
        return await stub(metadata=metadata, timeout=10).read()
    started = stub(request, metadata=metadata, timeout=10)
    return await (read(started) if method.server_streaming else started)


def raw(channel: grpc.aio.Channel, path: str, data: bytes) -> Any:
    multicallable: Any = channel.unary_unary(path)
    return multicallable(data)


async def status(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code(), caught.value.details() or ""


class Refusing(FakeLifecycle):
    """Has no model."""

    def model_for(self, identity: str) -> FakeModel:
        raise errors.ModelNotLoaded


@pytest.mark.parametrize("rpc", ["Predict", "PredictStream", "TokenizeString"])
async def test_a_request_that_is_refused_is_let_go_at_once(rpc: str) -> None:
    """Not only when Python next looks for cycles, for it may be of 50 MiB."""
    data = pb.PredictOptions(CorrelationId=rpc).SerializeToString()

    def kept() -> bool:
        requests = [seen for seen in gc.get_objects() if type(seen) is pb.PredictOptions]
        return rpc in {request.CorrelationId for request in requests}

    gc.disable()
    try:
        async with serving(Refusing()) as addr, connected(addr) as channel:
            code, _ = await status(raw(channel, f"/{SERVICE}/{rpc}", data))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            for _ in range(100):  # the status may be here before its sender has ended
                if not kept():
                    break
                await asyncio.sleep(0.05)
            else:
                pytest.fail("kept for 5 s")
    finally:
        gc.enable()


async def test_health_is_ok_whatever_is_broken(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.error = RuntimeError("everything else is broken")
    reply = await backend.Health(NOTHING)
    assert reply == pb.Reply(message=b"OK")


async def test_health_of_an_engine_that_died(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.health_error = errors.EngineGone("the engine died: ValueError: gone")
    assert await status(backend.Health(NOTHING)) == (
        grpc.StatusCode.UNAVAILABLE,
        "the engine died: ValueError: gone",
    )


async def test_an_error_is_told_as_the_lifecycle_explains_it(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.error = ZeroDivisionError()
    lifecycle.explanation = errors.EngineGone("the engine died: out of memory")
    for call in (backend.Predict(pb.PredictOptions()), read(backend.PredictStream(pb.PredictOptions()))):
        assert await status(call) == (grpc.StatusCode.UNAVAILABLE, "the engine died: out of memory")


async def test_answers(backend: Any, lifecycle: FakeLifecycle) -> None:
    assert (await backend.Predict(pb.PredictOptions(Prompt="x"))).message == b"a"
    assert await read(backend.PredictStream(pb.PredictOptions(Prompt="x"))) == lifecycle.model.replies
    assert (await backend.TokenizeString(pb.PredictOptions(Prompt="x"))).tokens == [5, 6]
    assert (await backend.Detokenize(pb.DetokenizeRequest(tokens=[5]))).content == "text"
    assert [type(request).__name__ for request in lifecycle.model.requests] == ["PredictOptions"] * 3 + [
        "DetokenizeRequest"
    ]


async def test_the_identity_is_asked_for_where_a_request_has_one(backend: Any, lifecycle: FakeLifecycle) -> None:
    named = pb.PredictOptions(ModelIdentity="org/a")
    await backend.Predict(named)
    await read(backend.PredictStream(named))
    await backend.TokenizeString(named)
    await backend.Detokenize(pb.DetokenizeRequest())
    assert lifecycle.asked == ["org/a", "org/a", "org/a", ""]


ERRORS: list[tuple[Exception, grpc.StatusCode, str]] = [
    (errors.ModelNotLoaded(), grpc.StatusCode.FAILED_PRECONDITION, "model not loaded"),
    (errors.IdentityMismatch("a", "b"), grpc.StatusCode.NOT_FOUND, "model identity mismatch"),
    (errors.InvalidRequest("TopK", "odd"), grpc.StatusCode.INVALID_ARGUMENT, "TopK: odd"),
    (errors.Unsupported("no images"), grpc.StatusCode.UNIMPLEMENTED, "no images"),
    (errors.Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
    (MemoryError("no memory"), grpc.StatusCode.RESOURCE_EXHAUSTED, "no memory"),
    (errors.EngineGone("stopping"), grpc.StatusCode.UNAVAILABLE, "stopping"),
    (ZeroDivisionError("secret"), grpc.StatusCode.INTERNAL, "internal error"),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: type(case[0]).__name__)
@pytest.mark.parametrize("name", ["Predict", "PredictStream", "TokenizeString", "Detokenize"])
async def test_status_of_an_exception(
    channel: grpc.aio.Channel,
    lifecycle: FakeLifecycle,
    name: str,
    case: tuple[Exception, grpc.StatusCode, str],
) -> None:
    error, code, text = case
    for raiser in (lifecycle, lifecycle.model):
        raiser.error = error
        found, details = await status(call(channel, name))
        assert found is code
        assert text in details
        assert "secret" not in details
        raiser.error = None


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: type(case[0]).__name__)
async def test_the_log_line_of_a_request_that_fails_names_it(
    backend: Any,
    lifecycle: FakeLifecycle,
    case: tuple[Exception, grpc.StatusCode, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.handler.setFormatter(TextFormatter("%(levelname)s %(message)s"))
    caplog.set_level(logging.DEBUG, "backend.errors")
    lifecycle.model.error, code, _ = case
    await status(backend.Predict(pb.PredictOptions(CorrelationId="req-7")))
    lines = caplog.text.splitlines()
    assert lines
    assert all(line.endswith(" (request req-7)") for line in lines)
    above = [line for line in lines if not line.startswith("DEBUG")]
    assert bool(above) is (code is grpc.StatusCode.INTERNAL)
    assert "secret" not in "".join(above)


async def test_an_exception_within_a_stream(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.model.error, lifecycle.model.error_after = errors.EngineGone("died"), 1
    replies = []

    async def collect() -> None:
        async for reply in backend.PredictStream(pb.PredictOptions()):
            replies.append(reply)  # noqa: PERF401  # those before the exception count

    assert await status(collect()) == (grpc.StatusCode.UNAVAILABLE, "died")
    assert replies == lifecycle.model.replies[:1]
    assert lifecycle.model.closed_streams == 1


@pytest.mark.parametrize(
    "text", ["x" * 1_000_000, "東" * 100_000, "\udfff", "a\0b\nc"], ids=["long", "wide", "half", "odd"]
)
@pytest.mark.parametrize("name", ["Predict", "PredictStream"])
async def test_any_text_of_an_exception_reaches_the_caller(
    channel: grpc.aio.Channel, lifecycle: FakeLifecycle, name: str, text: str
) -> None:
    lifecycle.model.error = errors.InvalidRequest("Messages[0].role", text)
    code, details = await status(call(channel, name))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("Messages[0].role: ")


async def test_a_client_that_goes_away_ends_the_work(channel: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    lifecycle.model.hold = asyncio.Event()
    backend: Any = pb_grpc.BackendStub(channel)
    stream = backend.PredictStream(pb.PredictOptions())
    await stream.read()
    stream.cancel()
    for _ in range(1000):
        if lifecycle.model.closed_streams:
            break
        await asyncio.sleep(0.005)
    assert lifecycle.model.closed_streams == 1


async def test_a_deadline_ends_the_work(channel: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    lifecycle.model.hold = asyncio.Event()
    backend: Any = pb_grpc.BackendStub(channel)
    code, _ = await status(read(backend.PredictStream(pb.PredictOptions(), timeout=0.05)))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    for _ in range(1000):
        if lifecycle.model.closed_streams:
            break
        await asyncio.sleep(0.005)
    assert lifecycle.model.closed_streams == 1


async def test_load_and_free(backend: Any, lifecycle: FakeLifecycle) -> None:
    options = pb.ModelOptions(Model="org/a", MaxModelLen=5)
    assert (await backend.LoadModel(options)).success
    assert (await backend.Free(NOTHING)).success
    assert lifecycle.asked == [options, "free"]


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("Options", "odd"),
        errors.Unsupported("no embeddings"),
        errors.LoadFailed("ValueError: no memory"),
        errors.LoadCancelled("Free came first"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_load_that_fails_is_an_answer(backend: Any, lifecycle: FakeLifecycle, error: Exception) -> None:
    lifecycle.error = error
    assert await backend.LoadModel(pb.ModelOptions()) == pb.Result(success=False, message=str(error))


async def test_a_load_at_the_end_of_the_process_is_refused(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.error = errors.EngineGone("the server is shutting down")
    assert await status(backend.LoadModel(pb.ModelOptions())) == (
        grpc.StatusCode.UNAVAILABLE,
        "the server is shutting down",
    )


async def test_a_cause_that_is_no_text_is_an_answer_too(backend: Any, lifecycle: FakeLifecycle) -> None:
    # File names outside UTF-8 get into messages this way.
    lifecycle.error = errors.LoadFailed("FileNotFoundError: b\udcff.json")
    result = await backend.LoadModel(pb.ModelOptions(), timeout=10)
    assert not result.success
    assert result.message.startswith("FileNotFoundError: b")


async def test_a_bug_in_a_load_is_a_status(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.error = ZeroDivisionError()
    for attempt in (backend.LoadModel(pb.ModelOptions()), backend.Free(NOTHING)):
        code, _ = await status(attempt)
        assert code is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("name", ROOMS)
async def test_each_rpc_reaches_its_room(backend: Any, lifecycle: FakeLifecycle, name: str) -> None:
    _, request, reply = ROOMS[name]
    started = getattr(backend, name)(request, timeout=10)
    assert await (read(started) if name.endswith("Stream") else started) == (
        [reply] if name.endswith("Stream") else reply
    )
    assert lifecycle.asked == [getattr(request, "ModelIdentity", "")]
    assert lifecycle.model.requests == [None if name == "GetMetrics" else request]


@pytest.mark.parametrize("name", ROOMS)
async def test_a_model_that_cannot_do_it(channel: grpc.aio.Channel, lifecycle: FakeLifecycle, name: str) -> None:
    lifecycle.model.error = errors.Unsupported("needs another model")
    assert await status(call(channel, name)) == (grpc.StatusCode.UNIMPLEMENTED, "needs another model")


async def test_what_is_not_served_says_so(channel: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    lifecycle.error = errors.ModelNotLoaded()  # with or without a model
    code, details = await status(call(channel, UNSERVED))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert details.startswith(f"{UNSERVED} ")


async def test_a_method_that_does_not_exist(channel: grpc.aio.Channel) -> None:
    for path in (f"/{SERVICE}/Nope", "/other.Service/Nope"):
        code, _ = await status(raw(channel, path, b""))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    for name in ("Predict", "PredictStream", "LoadModel"):
        for data in (b"\xff\xff", b"\x0a\x01\xff"):  # no field, and a text that is not UTF-8
            code, _ = await status(raw(channel, f"/{SERVICE}/{name}", data))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert lifecycle.asked == []


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (State.NO_MODEL, "UNINITIALIZED"),
        (State.LOADING, "BUSY"),
        (State.READY, "READY"),
        (State.DRAINING, "BUSY"),
        (State.FAILED, "ERROR"),
    ],
)
async def test_state(backend: Any, lifecycle: FakeLifecycle, state: State, expected: str) -> None:
    lifecycle.state = state
    found = await backend.Status(NOTHING)
    assert pb.StatusResponse.State.Name(found.state) == expected
    assert found.memory.total == sum(found.memory.breakdown.values())
    assert found.memory.breakdown["server"] > 1_000_000


async def test_the_stage_of_a_load_is_in_the_status(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.state = State.LOADING
    lifecycle.load_clock = StageClock(lambda _stage, _seconds: None)
    assert not [name for name in (await backend.Status(NOTHING)).memory.breakdown if "loading" in name]
    lifecycle.load_clock.enter("loading weights")
    lifecycle.load_clock.waiting = ("node 1: run.sh serve model",)
    memory = (await backend.Status(NOTHING)).memory
    assert memory.breakdown["loading, loading weights (seconds)"] == 0
    assert memory.breakdown["waiting (seconds) for node 1: run.sh serve model"] == 0
    assert memory.total == sum(size for name, size in memory.breakdown.items() if "seconds" not in name)


async def test_what_the_engine_holds_is_in_the_status_and_counts_once(backend: Any, lifecycle: FakeLifecycle) -> None:
    lifecycle.memory = {"weights": 10**15, "KV cache": 10**15}
    memory = (await backend.Status(NOTHING)).memory
    assert memory.breakdown["weights"] == memory.breakdown["KV cache"] == 10**15
    assert memory.total == sum(size for name, size in memory.breakdown.items() if name not in lifecycle.memory)


# Counting, and the trace that a caller brings along.


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
async def counted(lifecycle: FakeLifecycle, counters: Counters) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to a server that counts."""
    async with serving(lifecycle, counters) as addr, connected(addr) as channel:
        yield channel


async def eventually(condition: Callable[[], Any]) -> None:
    """A caller may hear of the end before the server has counted it."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # counters have no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("case", [None, *ERRORS], ids=lambda case: type(case[0]).__name__ if case else "OK")
@pytest.mark.parametrize("name", ["Predict", "PredictStream", "TokenizeString", "Detokenize"])
async def test_rpcs_are_counted_with_their_status(
    counted: grpc.aio.Channel,
    lifecycle: FakeLifecycle,
    counters: Counters,
    name: str,
    case: tuple[Exception, grpc.StatusCode, str] | None,
) -> None:
    lifecycle.error = case[0] if case else None
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call(counted, name)
    await eventually(lambda: counters.finished)
    assert counters.started == {name: 1}
    assert counters.finished == {(name, case[1].name if case else "OK"): 1}
    assert sum(counters.rpc_seconds[name].counts) == 1


@pytest.mark.parametrize("timeout", [None, 0.05, 0.5])
async def test_callers_that_go_away_are_counted_by_what_ended_them(
    counted: grpc.aio.Channel, lifecycle: FakeLifecycle, counters: Counters, timeout: float | None
) -> None:
    lifecycle.model.hold = asyncio.Event()
    backend: Any = pb_grpc.BackendStub(counted)
    stream = backend.PredictStream(pb.PredictOptions(), timeout=timeout)
    await stream.read()
    assert counters.started == {"PredictStream": 1}
    assert counters.finished == {}
    if timeout is None:
        stream.cancel()
    await eventually(lambda: counters.finished)
    assert counters.finished == {("PredictStream", "DEADLINE_EXCEEDED" if timeout else "CANCELLED"): 1}


async def test_a_cancelled_caller_with_time_left_is_no_deadline(
    counted: grpc.aio.Channel, lifecycle: FakeLifecycle, counters: Counters
) -> None:
    lifecycle.model.hold = asyncio.Event()
    backend: Any = pb_grpc.BackendStub(counted)
    stream = backend.PredictStream(pb.PredictOptions(), timeout=60)
    await stream.read()
    stream.cancel()
    await eventually(lambda: counters.finished)
    assert counters.finished == {("PredictStream", "CANCELLED"): 1}


async def test_callers_that_leave_while_they_are_written_to_are_no_error(
    lifecycle: FakeLifecycle, counters: Counters, caplog: pytest.LogCaptureFixture
) -> None:
    """With messages as large as those for slow readers, gRPC's writes fail before it cancels the handler."""
    lifecycle.model.replies = [pb.Reply(message=b"x" * 40_000)] * 500
    async with serving(lifecycle, counters) as addr:
        client = await asyncio.create_subprocess_exec(sys.executable, "-c", LEAVING, addr, str(STREAMS), cwd=ROOT)
        assert await client.wait() == 0
        await eventually(lambda: counters.finished.total() == STREAMS)
    assert counters.finished == {("PredictStream", "CANCELLED"): STREAMS}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_malformed_requests_and_unknown_methods_are_counted(
    counted: grpc.aio.Channel, counters: Counters
) -> None:
    await status(raw(counted, f"/{SERVICE}/Predict", b"\xff\xff"))
    for path in (f"/{SERVICE}/One", f"/{SERVICE}/Two", "/other.Service/Nope"):
        await status(raw(counted, path, b""))
    await eventually(lambda: counters.finished.total() == 4)
    assert counters.finished == {("Predict", "INVALID_ARGUMENT"): 1, ("unknown", "UNIMPLEMENTED"): 3}


async def test_the_refused_are_counted_too(lifecycle: FakeLifecycle, counters: Counters) -> None:
    async with serving(lifecycle, counters, auth_token=WORD) as addr, connected(addr) as channel:
        await status(call(channel, "Predict"))
        await status(raw(channel, f"/{SERVICE}/Nope", b""))
        await eventually(lambda: counters.finished.total() == 2)
    assert counters.finished == {("Predict", "UNAUTHENTICATED"): 1, ("unknown", "UNAUTHENTICATED"): 1}


async def test_who_counts_a_request(counted: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    await call(counted, "Predict")
    await call(counted, "PredictStream")
    assert [type(observer) for observer in lifecycle.model.observers] == [Request, Stream]


TRACE = (("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), ("tracestate", "a=1,b=2"))


TRACED = [method.name for method in METHODS if "ModelIdentity" in method.input_type.fields_by_name]


@pytest.mark.parametrize("name", TRACED)
async def test_the_trace_of_a_caller(channel: grpc.aio.Channel, lifecycle: FakeLifecycle, name: str) -> None:
    await call(channel, name, TRACE)
    lifecycle.model.traced = True
    for metadata in (TRACE, TRACE[1:], (("traceparent", "none"),), ()):
        await call(channel, name, metadata)
    assert lifecycle.model.traces == [None, dict(TRACE), None, None, None]


# Tokens.


@pytest.fixture
async def guarded(lifecycle: FakeLifecycle) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to a server that wants a token."""
    async with serving(lifecycle, auth_token=WORD) as addr, connected(addr) as channel:
        yield channel


WRONG = [
    (),
    (("authorization", ""),),
    (("authorization", WORD),),
    (("authorization", f"bearer {WORD}"),),
    (("authorization", f"Bearer {WORD}x"),),
    (("authorization", f"Bearer {WORD[:-1]}"),),
    (("authorization", "Bearer "),),
    (("authorization", f"Bearer  {WORD}"),),
    (("x-authorization", f"Bearer {WORD}"),),
]
RIGHT = (("authorization", f"Bearer {WORD}"),)


@pytest.mark.parametrize("name", [method.name for method in METHODS])
async def test_no_method_without_the_token(guarded: grpc.aio.Channel, lifecycle: FakeLifecycle, name: str) -> None:
    code, _ = await status(call(guarded, name))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert lifecycle.asked == []


@pytest.mark.parametrize("metadata", WRONG, ids=str)
async def test_wrong_tokens(
    guarded: grpc.aio.Channel, lifecycle: FakeLifecycle, metadata: tuple[tuple[str, str], ...]
) -> None:
    for name in ("Predict", "PredictStream", "Health"):
        code, details = await status(call(guarded, name, metadata))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert WORD not in details
    assert lifecycle.asked == []


@pytest.mark.parametrize("name", sorted(SERVED))
async def test_with_the_token(guarded: grpc.aio.Channel, name: str) -> None:
    await call(guarded, name, RIGHT)


async def test_a_method_that_does_not_exist_needs_the_token_too(guarded: grpc.aio.Channel) -> None:
    code, _ = await status(raw(guarded, f"/{SERVICE}/Nope", b""))
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_grpc_health_needs_the_token(guarded: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(guarded)
    request = health_pb2.HealthCheckRequest()
    assert (await status(health.Check(request)))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert (await status(read(health.Watch(request))))[0] is grpc.StatusCode.UNAUTHENTICATED
    answer = await health.Check(request, metadata=RIGHT)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def reflected(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = ()) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers: Any = await read(stub.ServerReflectionInfo(iter([request]), metadata=metadata))
    return {service.name for answer in answers for service in answer.list_services_response.service}


async def test_reflection_needs_the_token(guarded: grpc.aio.Channel) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(guarded)
    assert (await status(stub.ServerReflectionInfo().read()))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert SERVICE in await reflected(guarded, RIGHT)


async def test_health_and_reflection_without_a_token(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert await reflected(channel) == {
        "backend.Backend",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_a_server_without_a_token_ignores_those_that_are_sent(channel: grpc.aio.Channel) -> None:
    await call(channel, "Health", RIGHT)


# Sizes.


@pytest.mark.parametrize("mib", [1, 6])
async def test_the_largest_message(lifecycle: FakeLifecycle, mib: int) -> None:
    fits, too_long = mib * MIB - 1000, mib * MIB + 1
    async with serving(lifecycle, max_message_mib=mib) as addr, connected(addr) as channel:
        backend: Any = pb_grpc.BackendStub(channel)
        await backend.Predict(pb.PredictOptions(Prompt="x" * fits))
        code, _ = await status(backend.Predict(pb.PredictOptions(Prompt="x" * too_long)))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        lifecycle.model.replies = [pb.Reply(message=b"x" * fits)]
        assert len((await backend.Predict(pb.PredictOptions())).message) == fits
        lifecycle.model.replies = [pb.Reply(message=b"x" * too_long)]
        code, _ = await status(backend.Predict(pb.PredictOptions()))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


# Sockets.


@contextlib.contextmanager
def refused(addr: str, lifecycle: FakeLifecycle) -> Iterator["pytest.ExceptionInfo[SettingsError]"]:
    server = build_server(Settings(addr=addr), cast("Lifecycle", lifecycle))
    with pytest.raises(SettingsError) as caught:
        listen(server, addr)
    assert str(caught.value).startswith(f"cannot listen on {addr}: ")
    yield caught


async def test_a_free_port_is_taken_and_told(lifecycle: FakeLifecycle) -> None:
    async with serving(lifecycle) as addr, connected(addr) as channel:
        assert addr.startswith("127.0.0.1:")
        assert not addr.endswith(":0")
        await call(channel, "Health")


@pytest.mark.skipif(not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
@pytest.mark.parametrize("addr", ["[::1]:0", "[::]:0"])
async def test_ipv6(lifecycle: FakeLifecycle, addr: str) -> None:
    async with serving(lifecycle, addr=addr) as taken, connected(taken.replace("[::]", "[::1]")) as channel:
        assert taken.startswith(addr[:-1])
        await call(channel, "Health")


async def test_a_port_in_use(lifecycle: FakeLifecycle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        addr = f"127.0.0.1:{other.getsockname()[1]}"
        with refused(addr, lifecycle) as caught:
            assert "in use" in str(caught.value)


async def test_a_port_of_another_server_of_ours(lifecycle: FakeLifecycle) -> None:
    # SO_REUSEPORT would let both have it, and each get half of the calls.
    async with serving(lifecycle) as addr:
        with refused(addr, lifecycle) as caught:
            assert "in use" in str(caught.value)
        # Neither would gRPC let it, should both look before either binds.
        other = build_server(Settings(addr=addr), cast("Lifecycle", lifecycle))
        with pytest.raises(RuntimeError):
            other.add_insecure_port(addr)


def lingering_port() -> int:
    """A port whose last server closed its connection first: the system keeps that one for a minute."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()
    return port


async def test_a_port_that_was_in_use_a_moment_ago(lifecycle: FakeLifecycle) -> None:
    addr = f"127.0.0.1:{lingering_port()}"
    async with serving(lifecycle, addr=addr) as taken, connected(addr) as channel:
        assert taken == addr
        await call(channel, "Health")


@pytest.mark.parametrize("addr", ["192.0.2.1:5000", "no-such-host.invalid:5000"])
async def test_an_address_that_is_not_ours(lifecycle: FakeLifecycle, addr: str) -> None:
    with refused(addr, lifecycle):
        pass


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short name: paths of sockets have at most 107 bytes."""
    return tmp_path_factory.mktemp("s")


@pytest.mark.parametrize("prefix", ["unix:", "unix://"])
async def test_a_unix_socket(lifecycle: FakeLifecycle, sockets: Path, prefix: str) -> None:
    addr = f"{prefix}{sockets}/a"
    async with serving(lifecycle, addr=addr) as taken, connected(f"unix:{sockets}/a") as channel:
        assert taken == addr
        assert stat.S_ISSOCK((sockets / "a").stat().st_mode)
        await call(channel, "Health")


async def test_a_live_unix_socket(lifecycle: FakeLifecycle, sockets: Path) -> None:
    addr = f"unix:{sockets}/a"
    async with serving(lifecycle, addr=addr), connected(addr) as channel:
        with refused(addr, lifecycle) as caught:
            assert "in use" in str(caught.value)
        await call(channel, "Health")


async def test_a_unix_socket_that_was_left_behind(lifecycle: FakeLifecycle, sockets: Path) -> None:
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(sockets / "a"))
        gone.listen()
    assert (sockets / "a").exists()
    async with serving(lifecycle, addr=f"unix:{sockets}/a") as addr, connected(addr) as channel:
        await call(channel, "Health")


def no_folder(folder: Path) -> str:
    return str(folder / "none" / "a")


def plain_file(folder: Path) -> str:
    (folder / "a").write_text("precious")
    return str(folder / "a")


def content(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def directory(folder: Path) -> str:
    (folder / "a").mkdir()
    return str(folder / "a")


def read_only_folder(folder: Path) -> str:
    (folder / "locked").mkdir(mode=0o500)
    return str(folder / "locked" / "a")


def long_path(folder: Path) -> str:
    return str(folder / ("a" * 120))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_folder, "no folder"),
        (plain_file, "no socket"),
        (directory, "no socket"),
        (read_only_folder, "not writable"),
        (long_path, ""),
    ],
)
async def test_a_path_that_cannot_be_a_socket(
    lifecycle: FakeLifecycle,
    sockets: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], str],
    reason: str,
) -> None:
    path = make(sockets)
    if make is read_only_folder and os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root may write anywhere
    with refused(f"unix:{path}", lifecycle) as caught:
        assert reason in str(caught.value)


async def test_a_file_in_the_way_is_left_alone(lifecycle: FakeLifecycle, sockets: Path) -> None:
    path = plain_file(sockets)
    with refused(f"unix:{path}", lifecycle):
        pass
    assert content(path) == "precious"
