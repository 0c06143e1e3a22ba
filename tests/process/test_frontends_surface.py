"""What an operator meets of several serving processes before any model: token, TLS, probes; all on each of them."""

import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.certificates import Authority
from tests.process.orchestrator import PROBE_SECONDS, Backend, eventually, free_port
from tests.process.test_frontends import LISTEN_SECONDS, TRIES, on_each, running, same

COUNT = 3
TOKEN = (("authorization", "Bearer secret"),)


def test_the_token_is_asked_for_by_all() -> None:
    with running(COUNT, LOCALAI_GRPC_AUTH_TOKEN="secret") as frontends:  # noqa: S106  # of this test
        code, text = same(on_each(frontends, lambda stub: stub.Status(pb.HealthMessage())))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert text
        ask = pb.PredictOptions(Prompt="x")
        assert same(on_each(frontends, lambda stub: stub.Predict(ask, metadata=TOKEN))) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "model not loaded",
        )


def test_headers_pass_through_all_up_to_the_same_size() -> None:
    """What is passed on has a little more of them."""

    def passes(stub: pb_grpc.BackendStub, size: int) -> bool:
        try:
            stub.Health(pb.HealthMessage(), metadata=[("padding", "x" * size)], timeout=PROBE_SECONDS)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # noqa: PT017  # what else it raises is a failure
            return False
        return True

    with running(2) as frontends, frontends.each() as stubs:
        found = {size: [passes(stub, size) for stub in stubs.values()] for size in range(15_500, 16_500, 20)}
    assert [answers for answers in found.values() if any(answers) is not all(answers)] == []
    assert {answers[0] for answers in found.values()} == {True, False}


def test_probes_of_all_hear_of_the_end() -> None:
    with running(COUNT) as frontends, contextlib.ExitStack() as stack:
        watches = []
        for _ in range(4 * COUNT):  # so many connections come to several
            options = (("grpc.use_local_subchannel_pool", 1),)
            channel = stack.enter_context(grpc.insecure_channel(frontends.backend.addr, options))
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watches.append(watch)
        served = [psutil.Process(pid).net_connections("tcp") for pid in frontends.pids()]
        assert sum(any(c.status == psutil.CONN_ESTABLISHED for c in found) for found in served) >= 2
        frontends.backend.signal_group(signal.SIGTERM)
        for watch in watches:
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.RpcError) as raised:
                next(watch)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert frontends.backend.wait_for_exit(10) == 0


def handshakes(port: int, authority: Authority) -> Iterator[tuple[int | None, int]]:
    """Who answered on a new connection (None: it can't be told), with which certificate (its serial)."""
    context = ssl.create_default_context(cadata=authority.cert.decode())
    context.set_alpn_protocols(["h2"])
    for _ in range(TRIES):
        with (
            socket.create_connection(("127.0.0.1", port), timeout=PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            here = connection.getsockname()[1]
            found = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.raddr]
            pids = [c.pid for c in found if c.raddr and c.raddr.port == here]
            yield (pids[0] if pids else None), int(str((connection.getpeercert() or {})["serialNumber"]), 16)


def test_a_renewed_certificate_is_shown_by_all(tmp_path: Path) -> None:
    authority = Authority("ours")
    cert, key = authority.issue("server").write(tmp_path, "server")
    addr = f"127.0.0.1:{free_port()}"
    port = int(addr.rpartition(":")[2])
    argv = ["--addr", addr, "--frontends", str(COUNT), "--tls-cert", str(cert), "--tls-key", str(key)]
    with Backend(addr=addr, argv=argv) as backend:
        eventually(lambda: backend.stderr.count("frontend 2 listens") == 1, LISTEN_SECONDS, "it listens")
        eventually(lambda: backend.stderr.count("frontend 3 listens") == 1, LISTEN_SECONDS, "it listens")

        def shown() -> dict[int | None, int]:
            found: dict[int | None, int] = {}
            for pid, serial in handshakes(port, authority):
                found[pid] = serial
                if len(found) == COUNT:
                    break
            return found

        before = shown()
        assert len(before) == COUNT
        first = same(list(before.values()))
        cert, key = authority.issue("server").write(tmp_path, "new")
        os.replace(key, tmp_path / "server.key")
        os.replace(cert, tmp_path / "server.pem")
        after = shown()
        assert after.keys() == before.keys()
        assert same(list(after.values())) != first
