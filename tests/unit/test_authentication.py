"""Nothing is served, and nothing is looked at, without the token."""

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from backend.logs import hide_header_value
from backend.server import MOST_HEADER_BYTES, SERVICE
from common.pb import backend_pb2 as pb
from tests.unit.test_server import RIGHT, WORD, FakeLifecycle, connected, serving, status

SERVICES: list[tuple[FileDescriptor, dict[str, Any]]] = [
    (pb.DESCRIPTOR, {}),
    (health_pb2.DESCRIPTOR, {}),
    (reflection_pb2.DESCRIPTOR, {}),
]
with contextlib.suppress(ImportError):  # installed with the extra `channelz`
    from grpc_channelz.v1 import channelz_pb2

    SERVICES.append((channelz_pb2.DESCRIPTOR, {"channelz": True}))

METHODS = [
    (f"/{service.full_name}/{method.name}", method.client_streaming, method.server_streaming, settings)
    for file, settings in SERVICES
    for service in file.services_by_name.values()
    for method in service.methods
]
UNKNOWN: list[tuple[str, bool, bool, dict[str, Any]]] = [
    (f"/{SERVICE}/Nope", False, False, {}),
    ("/other.Service/Nope", True, True, {}),
    ("/", False, False, {}),
]


@pytest.fixture
def lifecycle() -> FakeLifecycle:
    return FakeLifecycle()


@pytest.fixture
async def addr(lifecycle: FakeLifecycle) -> AsyncIterator[str]:
    async with serving(lifecycle, auth_token=WORD) as addr:
        yield addr


@pytest.fixture
async def channel(addr: str) -> AsyncIterator[grpc.aio.Channel]:
    async with connected(addr, **{"grpc.max_metadata_size": 1024 * 1024}) as channel:
        yield channel


async def answer(channel: grpc.aio.Channel, path: str, *, sends: bool, receives: bool, metadata: Any) -> Any:
    """One empty message to any method, as that of its kind; no stubs, which would know the service."""
    kind = ("stream" if sends else "unary") + "_" + ("stream" if receives else "unary")
    multicallable: Any = getattr(channel, kind)(path)
    if sends:
        call = multicallable(metadata=metadata, timeout=10)
        # Nothing is sent: a write that meets the end of the call would hide its status.
        return await call.read() if receives else await call
    call = multicallable(b"", metadata=metadata, timeout=10)
    return await call.read() if receives else await call


def test_the_table_has_every_service() -> None:
    assert {path.split("/")[1] for path, *_ in METHODS} >= {
        "backend.Backend",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert len(METHODS) >= 20


@pytest.mark.parametrize(("path", "sends", "receives", "settings"), [*METHODS, *UNKNOWN], ids=str)
async def test_no_method_without_the_token(
    lifecycle: FakeLifecycle, path: str, sends: bool, receives: bool, settings: dict[str, Any]
) -> None:
    async with serving(lifecycle, auth_token=WORD, **settings) as addr, connected(addr) as channel:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            code, details = await status(
                answer(channel, path, sends=sends, receives=receives, metadata=metadata),
            )
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert WORD not in details
    assert lifecycle.asked == []
    assert lifecycle.model.requests == []


@pytest.mark.parametrize(
    "values",
    [
        [f"Bearer {WORD}", f"Bearer {WORD}"],
        [f"Bearer {WORD}", "Bearer wrong"],
        ["Bearer wrong", f"Bearer {WORD}"],
        [f"Bearer {WORD}", ""],
        ["", f"Bearer {WORD}"],
        ["Bearer wrong"] * 50,
        [f"Bearer {WORD},Bearer {WORD}"],
        [f"Bearer {WORD}, Bearer wrong"],
        [f"Bearer {WORD};"],
        [f"Basic {WORD}"],
        ["Bearer " + "a" * 8000],
        ["Bearer"],
    ],
    ids=lambda values: " | ".join(values)[:60],
)
async def test_headers_that_do_not_say_who_is_asking(
    channel: grpc.aio.Channel, lifecycle: FakeLifecycle, values: list[str]
) -> None:
    metadata = tuple(("authorization", value) for value in values)
    for name, receives in (("Predict", False), ("PredictStream", True)):
        attempt = answer(channel, f"/{SERVICE}/{name}", sends=False, receives=receives, metadata=metadata)
        assert (await status(attempt))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert lifecycle.asked == []


async def test_a_binary_header_is_another_one(channel: grpc.aio.Channel) -> None:
    metadata = (("authorization-bin", f"Bearer {WORD}".encode()),)
    attempt = answer(channel, f"/{SERVICE}/Health", sends=False, receives=False, metadata=metadata)
    assert (await status(attempt))[0] is grpc.StatusCode.UNAUTHENTICATED


async def test_a_header_longer_than_any_may_be(channel: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    metadata = (("authorization", "Bearer " + "a" * MOST_HEADER_BYTES),)
    attempt = answer(channel, f"/{SERVICE}/Predict", sends=False, receives=False, metadata=metadata)
    # gRPC itself refuses it, before anything of ours sees the call.
    assert (await status(attempt))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert lifecycle.asked == []


async def test_bytes_that_are_no_message_do_not_get_past(channel: grpc.aio.Channel, lifecycle: FakeLifecycle) -> None:
    call: Any = channel.unary_unary(f"/{SERVICE}/Predict")
    assert (await status(call(b"\xff\xff")))[0] is grpc.StatusCode.UNAUTHENTICATED
    assert lifecycle.asked == []


@pytest.mark.parametrize("token", ["a b", "~!@#$%^&*()_+{}|:<>?,./;'[]=-`", "a" * 4000, '"quoted"', "a=b,c=d"])
async def test_any_token_that_a_header_can_carry(lifecycle: FakeLifecycle, token: str) -> None:
    async with serving(lifecycle, auth_token=token) as addr, connected(addr) as channel:
        metadata = (("authorization", f"Bearer {token}"),)
        await answer(channel, f"/{SERVICE}/Health", sends=False, receives=False, metadata=metadata)
        wrong = (("authorization", f"Bearer {token}!"),)
        attempt = answer(channel, f"/{SERVICE}/Health", sends=False, receives=False, metadata=wrong)
        assert (await status(attempt))[0] is grpc.StatusCode.UNAUTHENTICATED


# Headers that gRPC's own clients refuse to send.


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack("!I", len(payload))[1:] + bytes((kind, flags)) + struct.pack("!I", stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header that is neither compressed nor remembered (RFC 7541, 6.2.2); at most 126 bytes each."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def health_call(authorization: bytes) -> bytes:
    """A connection's first bytes, and a call of Health."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", f"/{SERVICE}/Health".encode()),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"authorization", authorization),
    ]
    block = b"".join(literal(name, value) for name, value in headers)
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(4, 0, 0, b"")
        + frame(1, 4, 1, block)  # HEADERS, complete
        + frame(0, 1, 1, b"\x00" * 5)  # DATA: an empty message, and the end
    )


async def served(addr: str, authorization: bytes) -> bool:
    """Whether the call is answered with Health's OK, before it is refused or the connection ends."""
    host, _, port = addr.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(health_call(authorization))
    received = b""
    try:
        while not any(end in received for end in (b"OK", b"grpc-status", b"\x00\x00\x04\x03\x00\x00\x00\x00\x01")):
            chunk = await asyncio.wait_for(reader.read(65536), 20)
            if not chunk:
                break
            received += chunk
    finally:
        writer.close()
    return b"\x02OK" in received


async def test_bytes_by_hand_get_the_answer_that_a_client_gets(addr: str) -> None:
    assert await served(addr, RIGHT[0][1].encode())
    assert not await served(addr, b"Bearer wrong")


OTHER_BYTES: list[Callable[[bytes], bytes]] = [
    lambda right: right + b"\xff",
    lambda right: right + "é".encode(),
    lambda right: b"\xff\xfe" + right,
    lambda right: right.replace(b"o", "о".encode()),  # noqa: RUF001  # looks the same in Cyrillic
    lambda right: right + b"\x00",
    lambda right: right + b"\r\nx: y",
    lambda right: right[:0],
]


@pytest.fixture
def discreet() -> Iterator[None]:
    """gRPC's logger as the process has it."""
    logger = logging.getLogger("grpc._cython.cygrpc")
    logger.addFilter(hide_header_value)
    yield
    logger.removeFilter(hide_header_value)


@pytest.mark.parametrize("spoil", OTHER_BYTES, ids=range(len(OTHER_BYTES)))
async def test_bytes_that_are_no_ascii(
    addr: str, spoil: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture, discreet: None
) -> None:
    assert not await served(addr, spoil(RIGHT[0][1].encode()))
    assert WORD not in caplog.text
    # And the server lives.
    assert await served(addr, RIGHT[0][1].encode())
