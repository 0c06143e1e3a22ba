"""Files that can't be used, who gets through to a server with TLS, and certificates that change under it."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from backend.flag_values import SettingsError
from backend.settings import TlsFiles
from backend.tls import server_credentials
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.certificates import Authority, Pair, PrivateKey
from tests.unit.test_server import RIGHT, WORD, FakeLifecycle, read, reflected, serving, status

OURS, OTHERS = Authority("ours"), Authority("others")
SERVER = OURS.issue("server")
CLIENT = OURS.issue("client")
STRANGER = OTHERS.issue("client")


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    """A server's certificate with its key, and the authority of its clients."""
    return written(tmp_path, SERVER)


def written(folder: Path, pair: Pair, authority: bytes = OURS.cert) -> TlsFiles:
    cert, key = pair.write(folder, "server")
    (folder / "ca.pem").write_bytes(authority)
    return TlsFiles(str(cert), str(key), str(folder / "ca.pem"))


def channel(addr: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    # Channels to one address would share a connection, and with it who they are.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost"))
    if credentials is None:
        return grpc.aio.insecure_channel(addr, options)
    return grpc.aio.secure_channel(addr, credentials, options)


def trusting(authority: Authority, pair: Pair | None = None) -> grpc.ChannelCredentials:
    key, cert = (pair.key, pair.cert) if pair else (None, None)
    return grpc.ssl_channel_credentials(authority.cert, key, cert)


async def greets(addr: str, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether Health answers on a new connection; otherwise there must be none."""
    async with channel(addr, credentials) as connection:
        stub: Any = pb_grpc.BackendStub(connection)
        try:
            reply = await stub.Health(pb.HealthMessage(), timeout=20)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return False
            raise
        assert reply.message == b"OK"
        return True


# Files.


def test_files_that_can_be_used(files: TlsFiles) -> None:
    assert isinstance(server_credentials(files), grpc.ServerCredentials)
    assert isinstance(server_credentials(TlsFiles(files.cert, files.key)), grpc.ServerCredentials)


BROKEN: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("no PEM", "cert", lambda: b"\x00\x01", "holds no certificate"),
    ("empty", "cert", lambda: b"", "holds no certificate"),
    ("a key for a certificate", "cert", lambda: SERVER.key, "holds no certificate"),
    ("cut off", "cert", lambda: SERVER.cert[:200], "holds no certificate"),
    ("expired", "cert", lambda: OURS.issue("server", first=-3, last=-1).cert, "expired on "),
    ("of tomorrow", "cert", lambda: OURS.issue("server", first=1, last=2).cert, "is not valid before "),
    ("no PEM", "key", lambda: b"secret", "holds no private key"),
    ("a certificate for a key", "key", lambda: SERVER.cert, "holds no private key"),
    ("cut off", "key", lambda: SERVER.key[:100], "holds no private key"),
    ("encrypted", "key", lambda: OURS.issue("server", password=b"pw").key, "is encrypted"),
    ("another's", "key", lambda: CLIENT.key, "doesn't belong to the first certificate of "),
    ("no PEM", "client_ca", lambda: b"x", "holds no certificate"),
    ("expired", "client_ca", lambda: Authority("old", first=-3, last=-1).cert, "expired on "),
]


@pytest.mark.parametrize(
    ("field", "data", "reason"), [case[1:] for case in BROKEN], ids=[f"{c[1]} {c[0]}" for c in BROKEN]
)
def test_a_file_that_cannot_be_used(files: TlsFiles, field: str, data: Callable[[], bytes], reason: str) -> None:
    path = getattr(files, field)
    Path(path).write_bytes(data())
    with pytest.raises(SettingsError) as caught:
        server_credentials(files)
    assert str(caught.value).startswith(f"--tls-{field.replace('_', '-')} {path}: {reason}")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("field", ["cert", "key", "client_ca"])
def test_a_file_that_is_missing_or_none(files: TlsFiles, field: str) -> None:
    path = Path(getattr(files, field))
    path.unlink()
    with pytest.raises(SettingsError, match=f"{path}: No such file"):
        server_credentials(files)
    path.mkdir()
    with pytest.raises(SettingsError, match=f"{path}: Is a directory"):
        server_credentials(files)


@pytest.mark.parametrize("make", [ed25519.Ed25519PrivateKey.generate, lambda: ec.generate_private_key(ec.SECP256K1())])
def test_a_kind_of_key_that_grpc_does_not_take(tmp_path: Path, make: Callable[[], PrivateKey]) -> None:
    files = written(tmp_path, OURS.issue("server", key=make()))
    with pytest.raises(SettingsError, match="use RSA, or EC with secp256r1"):
        server_credentials(files)


def test_a_bundle_of_authorities_may_hold_an_old_one(files: TlsFiles) -> None:
    assert files.client_ca is not None
    Path(files.client_ca).write_bytes(Authority("old", first=-3, last=-1).cert + OURS.cert)
    server_credentials(files)


@pytest.mark.parametrize(
    "make", [lambda: rsa.generate_private_key(65537, 2048), lambda: ec.generate_private_key(ec.SECP384R1())]
)
async def test_other_keys_and_a_chain(lifecycle: FakeLifecycle, tmp_path: Path, make: Callable[[], PrivateKey]) -> None:
    pair = OURS.issue("server", key=make())
    files = written(tmp_path, Pair(pair.cert + OURS.cert, pair.key))
    async with serving(lifecycle, tls=TlsFiles(files.cert, files.key)) as addr:
        assert await greets(addr, trusting(OURS))


# Who gets through.


@pytest.fixture
def lifecycle() -> FakeLifecycle:
    return FakeLifecycle()


CLIENTS = {
    "plain": None,
    "TLS": trusting(OURS),
    "good certificate": trusting(OURS, CLIENT),
    "certificate of another CA": trusting(OURS, STRANGER),
}
CONNECTS = {
    "no TLS": {"plain"},
    "TLS": {"TLS", "good certificate", "certificate of another CA"},
    "mutual TLS": {"good certificate"},
}
TOKENS = {"right": RIGHT, "wrong": (("authorization", f"Bearer {WORD}!"),), "missing": ()}


async def watched(connection: grpc.aio.Channel, metadata: Any) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(connection)
    call = stub.Watch(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=20)
    first = await call.read()
    if first is grpc.aio.EOF:
        raise grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details())
    call.cancel()
    return first


def calls(connection: grpc.aio.Channel, metadata: Any, *, gets_through: bool) -> dict[str, Any]:
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(connection)
    backend: Any = pb_grpc.BackendStub(connection)
    health: Any = health_pb2_grpc.HealthStub(connection)
    return {
        "unary": backend.Predict(pb.PredictOptions(Prompt="x"), metadata=metadata, timeout=20),
        "stream": read(backend.PredictStream(pb.PredictOptions(Prompt="x"), metadata=metadata, timeout=20)),
        "Health": backend.Health(pb.HealthMessage(), metadata=metadata, timeout=20),
        "Check": health.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=20),
        "Watch": watched(connection, metadata),
        # A write that meets the end of the call would hide its status.
        "reflection": reflected(connection, metadata)
        if gets_through
        else reflection.ServerReflectionInfo(metadata=metadata, timeout=20).read(),
    }


@pytest.mark.parametrize("transport", CONNECTS)
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("word", TOKENS)
async def test_who_gets_through(
    lifecycle: FakeLifecycle, files: TlsFiles, transport: str, client: str, word: str
) -> None:
    tls = {"no TLS": None, "TLS": TlsFiles(files.cert, files.key), "mutual TLS": files}[transport]
    gets_through = client in CONNECTS[transport] and word == "right"
    async with (
        serving(lifecycle, tls=tls, auth_token=WORD) as addr,
        channel(addr, CLIENTS[client]) as connection,
    ):
        for name, attempt in calls(connection, TOKENS[word], gets_through=gets_through).items():
            if gets_through:
                assert await attempt, name
                continue
            code, details = await status(attempt)
            expected = "UNAUTHENTICATED" if client in CONNECTS[transport] else "UNAVAILABLE"
            assert code.name == expected, name
            assert WORD not in details
    assert bool(lifecycle.asked) == gets_through


async def test_a_unix_socket_with_tls(lifecycle: FakeLifecycle, files: TlsFiles, tmp_path_factory: Any) -> None:
    addr = f"unix:{tmp_path_factory.mktemp('s')}/a"
    async with serving(lifecycle, addr=addr, tls=files):
        assert await greets(addr, trusting(OURS, CLIENT))
        assert not await greets(addr, trusting(OURS))
        assert not await greets(addr, None)


# Files that change.


@contextlib.asynccontextmanager
async def reloading(lifecycle: FakeLifecycle, files: TlsFiles) -> AsyncIterator[str]:
    async with serving(lifecycle, tls=files) as addr:
        assert await greets(addr, trusting(OURS, CLIENT))
        yield addr


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def replaced(path: str | None, data: bytes) -> None:
    """As certificates are renewed: written beside, then renamed."""
    assert path is not None
    Path(f"{path}.new").write_bytes(data)
    os.replace(f"{path}.new", path)


async def test_a_new_certificate_is_used_by_new_connections(lifecycle: FakeLifecycle, files: TlsFiles) -> None:
    async with reloading(lifecycle, files) as addr, channel(addr, trusting(OURS, CLIENT)) as before:
        stub: Any = pb_grpc.BackendStub(before)
        await stub.Health(pb.HealthMessage())
        renewed = OTHERS.issue("server")
        replaced(files.cert, renewed.cert)
        replaced(files.key, renewed.key)
        assert await greets(addr, trusting(OTHERS, CLIENT))
        assert not await greets(addr, trusting(OURS, CLIENT))
        assert (await stub.Health(pb.HealthMessage())).message == b"OK"


async def test_a_new_authority_of_clients(lifecycle: FakeLifecycle, files: TlsFiles) -> None:
    async with reloading(lifecycle, files) as addr:
        replaced(files.client_ca, OTHERS.cert)
        assert await greets(addr, trusting(OURS, STRANGER))
        assert not await greets(addr, trusting(OURS, CLIENT))


@pytest.mark.parametrize("field", ["cert", "key", "client_ca"])
@pytest.mark.parametrize("data", [b"", b"half a fi", None], ids=["empty", "broken", "removed"])
async def test_a_broken_file_keeps_the_former_certificate(
    lifecycle: FakeLifecycle, files: TlsFiles, field: str, data: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = getattr(files, field)
    good = content(path)
    async with reloading(lifecycle, files) as addr:
        if data is None:
            os.remove(path)
        else:
            replaced(path, data)
        with caplog.at_level(logging.WARNING, "backend.tls"):
            for _ in range(3):
                assert await greets(addr, trusting(OURS, CLIENT))
        # Once for each change, not for each connection.
        (record,) = [record for record in caplog.records if record.name == "backend.tls"]
        assert path in record.getMessage()
        assert "the former certificate stays in use" in record.getMessage()
        replaced(path, good)
        assert await greets(addr, trusting(OURS, CLIENT))


async def test_a_renewal_seen_half_way(lifecycle: FakeLifecycle, files: TlsFiles) -> None:
    renewed = OTHERS.issue("server")
    async with reloading(lifecycle, files) as addr:
        replaced(files.cert, renewed.cert)
        assert await greets(addr, trusting(OURS, CLIENT))  # the key is still the former one's
        replaced(files.key, renewed.key)
        assert await greets(addr, trusting(OTHERS, CLIENT))


async def test_an_expired_successor_is_not_taken(lifecycle: FakeLifecycle, files: TlsFiles) -> None:
    expired = OTHERS.issue("server", first=-3, last=-1)
    async with reloading(lifecycle, files) as addr:
        replaced(files.cert, expired.cert)
        replaced(files.key, expired.key)
        assert await greets(addr, trusting(OURS, CLIENT))
