"""Calls that would end grpc.aio's accepting loop, and what waits for the next call."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, and not in the stubs

from backend import accepting
from tests.fuzz import http2

HELLO = "/test.Greeter/Hello"
NO_TEXT = "/\udcff\udcfe"


class Asked(grpc.aio.ServerInterceptor):
    """Notes the paths of the calls that it is asked about."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]  # as gRPC has it
        self.paths.append(details.method)
        return await continuation(details)


async def _hello(request: bytes, _context: object) -> bytes:
    return b"hello " + request


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
async def server(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    monkeypatch.setattr(cygrpc, "AioServer", cygrpc.AioServer)  # for it to be put back
    accepting.install()
    server = grpc.aio.server(interceptors=[asked])
    server.add_registered_method_handlers("test.Greeter", {"Hello": grpc.unary_unary_rpc_method_handler(_hello)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield server, port
    await server.stop(None)


def _call(channel: grpc.aio.Channel, path: str) -> Any:
    method: Any = channel.unary_unary(path)
    return method(b"")


async def _answer(port: int, path: str) -> bytes:
    """All that comes in answer to a call, until its stream is closed by a header that says so."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"".join(http2.frames_of(path, b"")))
        said = b""
        while b"grpc-status" not in said:
            piece = await asyncio.wait_for(reader.read(1 << 16), 10)
            assert piece, said
            said += piece
        return said
    finally:
        writer.close()


async def test_a_path_that_is_no_text(server: tuple[grpc.aio.Server, int], asked: Asked) -> None:
    _, port = server
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(20):
            assert b"Method not found" in await _answer(port, NO_TEXT)
            assert await _call(channel, HELLO) == b"hello "
        assert asked.paths == [accepting.UNKNOWN_PATH, HELLO] * 20
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await _call(channel, "/test.Greeter/Nope")
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_many_unknown_at_once(server: tuple[grpc.aio.Server, int]) -> None:
    _, port = server
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [_call(channel, f"/test.Greeter/{number}") for number in range(500)]
        codes = {await call.code() for call in calls}
        assert codes == {grpc.StatusCode.UNIMPLEMENTED}


async def test_who_waits_is_cancelled(server: tuple[grpc.aio.Server, int]) -> None:
    """What the core writes to lives until the core is done with it, and nothing of it is left after that."""
    running, _ = server
    before = set(accepting._held)
    assert len(before) == 2  # for the one method, and for all others
    await asyncio.sleep(0)
    for method in (HELLO.encode(), None):
        waiting = running._server._make_request_call_future(method)  # type: ignore[attr-defined]  # gRPC's own
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await asyncio.sleep(0)
    held = set(accepting._held)
    assert len(held) == 4
    assert not any(task.done() for task in held)
    await running.stop(None)
    await asyncio.wait(held, timeout=10)
    assert not accepting._held
