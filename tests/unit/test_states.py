"""Walks the table of docs/reliability.md: every RPC in every state, in a server with a model of straw."""

import asyncio
import sys
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from backend.ending import Ending
from backend.health import MODEL, PROCESS
from backend.lifecycle import Lifecycle, State
from backend.server import build_server
from backend.settings import Settings
from backend.sockets import listen
from common.errors import EngineGone, Unsupported
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["Backend"].methods}
STATES = [state.value for state in State]
CAUSE = "the engine died: ValueError: no memory"
STATUS_OF_STATE = ["UNINITIALIZED", "BUSY", "READY", "BUSY", "ERROR"]


class Straw:
    """A model that answers; one that is `slow` loads until it is cancelled."""

    loading: asyncio.Event

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.dead = self.traced = False

    @classmethod
    async def load(cls, plan: Any, clock: Any, _frontends: Any) -> "Straw":
        clock.enter("loading weights")
        cls.loading.set()
        if plan.model == "slow":
            await asyncio.Event().wait()
        return cls(plan)

    async def cause_of_death(self) -> str:
        return "ValueError: no memory"

    async def predict(self, request: pb.PredictOptions, caller: Any) -> pb.Reply:
        if self.dead:
            raise EngineGone("it stopped")
        return pb.Reply(message=b"a")

    async def predict_stream(self, request: pb.PredictOptions, caller: Any) -> AsyncIterator[pb.Reply]:
        yield pb.Reply(message=b"a")

    async def tokenize(self, request: pb.PredictOptions) -> pb.TokenizationResponse:
        return pb.TokenizationResponse(length=1, tokens=[1])

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(content="a")

    def memory(self) -> dict[str, int]:
        return {"weights": 5}

    async def metrics(self) -> pb.MetricsResponse:
        return pb.MetricsResponse()

    async def metadata(self, request: pb.ModelOptions) -> pb.ModelMetadataResponse:
        return pb.ModelMetadataResponse()

    async def transcribe_stream(self, request: pb.TranscriptRequest) -> AsyncIterator[pb.TranscriptStreamResponse]:
        raise Unsupported("this is straw, and is deaf")
        yield pb.TranscriptStreamResponse()

    async def close(self, timeout: float) -> None:
        return

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def unsupported(*_args: Any) -> Any:
            raise Unsupported(f"this is straw, and has no {name}")

        return unsupported


def table() -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]]:
    """(RPC, state) -> what the cell says; the same of `grpc.health.v1`, by (name, state)."""
    found: dict[tuple[str, str], str] = {}
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in DOCUMENT.read_text().splitlines()
        if line.startswith("| ")
    ]
    start = next(index for index, row in enumerate(rows) if row[0] == "RPC")
    assert rows[start][1:] == STATES
    for names, *cells in rows[start + 1 : start + 8]:
        named = [name for name in METHODS if (name, STATES[0]) not in found]
        for name in named if names == "all others" else names.split(", "):
            found |= {(name, state): cell for state, cell in zip(STATES, cells, strict=True)}
    process, model = rows[start + 8 : start + 10]
    assert process[0] == f'Check, List, Watch of "" or `{PROCESS[1]}`'
    assert model[0] == f"Check, List, Watch of `{MODEL}`"
    health = {
        (name, state): cell
        for names, row in ((PROCESS, process), ((MODEL,), model))
        for name in names
        for state, cell in zip(STATES, row[1:], strict=True)
    }
    return found, health


TABLE, HEALTH_TABLE = table()


@pytest.fixture
async def lifecycle(monkeypatch: pytest.MonkeyPatch) -> Lifecycle:
    Straw.loading = asyncio.Event()
    module = types.ModuleType("common.model")
    vars(module).update(
        Model=Straw, plan_load=lambda options, *_, **__: types.SimpleNamespace(model=options.Model, engine_args={})
    )
    monkeypatch.setitem(sys.modules, "common.model", module)
    lifecycle = Lifecycle(Ending(), shutdown_timeout=1.0)
    lifecycle.import_in_background()
    return lifecycle


@pytest.fixture
async def channel(lifecycle: Lifecycle) -> AsyncIterator[grpc.aio.Channel]:
    settings = Settings(addr="127.0.0.1:0")
    server = build_server(settings, lifecycle)
    addr = listen(server, settings.addr)
    await server.start()
    async with grpc.aio.insecure_channel(addr) as channel:
        yield channel
    await lifecycle.free()
    await server.stop(0)


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> Any:
    return pb_grpc.BackendStub(channel)


@pytest.fixture
def health(channel: grpc.aio.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def bring_to(lifecycle: Lifecycle, state: str) -> "asyncio.Task[None] | None":
    """Through the same doors as in life; returns the load that runs, if one does."""
    if state == "loading":
        task = asyncio.create_task(lifecycle.load(pb.ModelOptions(Model="slow")))
        await Straw.loading.wait()
        return task
    if state != "no model":
        await lifecycle.load(pb.ModelOptions(Model="a"))
    if state == "draining":
        lifecycle.drain()
    if state == "failed":
        vars(lifecycle.model_for(""))["dead"] = True
        await lifecycle.explained(RuntimeError())
    assert lifecycle.state.value == state
    return None


async def answer(stub: Any, rpc: str) -> tuple[str, str, Any]:
    """Code, details and reply."""
    method = METHODS[rpc]
    request = {"LoadModel": pb.ModelOptions(Model="a")}.get(rpc) or getattr(pb, method.input_type.name)()
    given = iter([request]) if method.client_streaming else request
    try:
        call = getattr(stub, rpc)(given, timeout=10)
        reply = [chunk async for chunk in call] if method.server_streaming else await call
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or "", None
    return "OK", "", reply


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rpc", METHODS)
async def test_cell(stub: Any, lifecycle: Lifecycle, rpc: str, state: str) -> None:
    loading = await bring_to(lifecycle, state)
    if loading is not None and rpc == "LoadModel":
        # It would wait for ever; that it waits is shown, then the other is given up.
        waiting = asyncio.create_task(answer(stub, rpc))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        loading.cancel()
        code, details, reply = await waiting
    else:
        code, details, reply = await answer(stub, rpc)
    cell = TABLE[rpc, state]
    assert code == cell.split(",")[0].split(":")[0]
    if "the cause" in cell:
        assert details == CAUSE
    elif code == "UNAVAILABLE":
        assert details == "the server is shutting down"
    elif code == "FAILED_PRECONDITION":
        assert details == "model not loaded"
    if rpc == "Health" and code == "OK":
        assert reply.message == b"OK"
    if rpc == "Status":
        assert pb.StatusResponse.State.Name(reply.state) == STATUS_OF_STATE[STATES.index(state)] in cell
        assert ("stage" in cell) is any("loading weights" in name for name in reply.memory.breakdown)
    if rpc in ("LoadModel", "Free") and code == "OK":
        assert reply.success
        expected = {"LoadModel": "ready", "Free": "no model"}[rpc]
        assert lifecycle.state.value == (expected if state not in ("draining", "failed") else state)
    if loading is not None:
        loading.cancel()
        await asyncio.wait([loading])


def test_the_table_is_whole() -> None:
    assert set(TABLE) == {(rpc, state) for rpc in METHODS for state in STATES}


@pytest.mark.parametrize("state", STATES)
async def test_health_for_probes(health: Any, lifecycle: Lifecycle, state: str) -> None:
    loading = await bring_to(lifecycle, state)
    for name in (*PROCESS, MODEL):
        request = health_pb2.HealthCheckRequest(service=name)
        for found in (await health.Check(request, timeout=10), await health.Watch(request, timeout=10).read()):
            assert health_pb2.HealthCheckResponse.ServingStatus.Name(found.status) == HEALTH_TABLE[name, state]
    if loading is not None:
        loading.cancel()
        await asyncio.wait([loading])


async def test_probes_hear_of_a_death_with_the_first_request_that_does(
    stub: Any, health: Any, lifecycle: Lifecycle
) -> None:
    """Nobody watches the engine here: only the request tells."""
    await lifecycle.load(pb.ModelOptions(Model="a"))
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=10)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    vars(lifecycle.model_for(""))["dead"] = True
    assert await answer(stub, "Predict") == ("UNAVAILABLE", CAUSE, None)
    found = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_drain_does_not_wait_for_a_watch(stub: Any, health: Any, lifecycle: Lifecycle) -> None:
    await lifecycle.load(pb.ModelOptions(Model="a"))
    await answer(stub, "Predict")
    watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
    await watch.read()
    async with asyncio.timeout(30):
        await lifecycle.idle()
    assert not watch.done()
    watch.cancel()
