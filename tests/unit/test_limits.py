"""What a connection may carry: streams, pings, headers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from backend.server import MOST_HEADER_BYTES
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.unit.test_server import FakeLifecycle, call, connected, raw, serving, status


@pytest.fixture
def lifecycle() -> FakeLifecycle:
    return FakeLifecycle()


@pytest.fixture
async def channel(lifecycle: FakeLifecycle) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(lifecycle) as addr, connected(addr, **{"grpc.max_metadata_size": 1024 * 1024}) as channel:
        yield channel


async def left(stream: Any) -> int:
    """How many replies come yet."""
    count = 0
    while await stream.read() is not grpc.aio.EOF:
        count += 1
    return count


async def test_more_than_a_thousand_streams_on_a_connection(
    channel: grpc.aio.Channel, lifecycle: FakeLifecycle
) -> None:
    lifecycle.model.hold = asyncio.Event()
    backend: Any = pb_grpc.BackendStub(channel)
    streams = [backend.PredictStream(pb.PredictOptions(), timeout=60) for _ in range(1500)]
    # All have begun, and none has ended: they run at the same time.
    for first in await asyncio.gather(*(stream.read() for stream in streams)):
        assert first.message == b"a"
    assert lifecycle.model.closed_streams == 0
    lifecycle.model.hold.set()
    for stream in streams:
        assert await left(stream) == 2
    assert lifecycle.model.closed_streams == 1500


async def test_a_client_that_pings_all_the_time(lifecycle: FakeLifecycle) -> None:
    # gRPC's servers close a connection after three pings that come sooner than every five minutes.
    options = {
        "grpc.keepalive_time_ms": 10,
        "grpc.keepalive_timeout_ms": 5000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
    }
    lifecycle.model.hold = asyncio.Event()
    async with serving(lifecycle) as addr, connected(addr, **options) as channel:
        backend: Any = pb_grpc.BackendStub(channel)
        stream = backend.PredictStream(pb.PredictOptions(), timeout=60)
        await stream.read()
        await asyncio.sleep(1)
        lifecycle.model.hold.set()
        assert await left(stream) == 2
        await asyncio.sleep(0.5)
        assert channel.get_state() is grpc.ChannelConnectivity.READY
        await call(channel, "Health")


async def test_the_largest_headers(channel: grpc.aio.Channel) -> None:
    await call(channel, "Health", (("x-long", "a" * (MOST_HEADER_BYTES - 1000)),))
    code, _ = await status(call(channel, "Health", (("x-long", "a" * MOST_HEADER_BYTES),)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await call(channel, "Health")


async def test_a_long_name_of_a_method(channel: grpc.aio.Channel) -> None:
    code, _ = await status(raw(channel, "/" + "a" * 5000, b""))
    assert code is grpc.StatusCode.UNIMPLEMENTED
