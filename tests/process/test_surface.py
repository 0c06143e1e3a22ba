"""What an operator meets before any model: flags that print, TLS, sockets, probes, log lines."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.certificates import Authority
from tests.process.orchestrator import DEATH_SECONDS, RUN_SH, STOP_SECONDS, Backend, eventually, free_port
from tests.process.wire import PARSERS, model_options

OURS, OTHERS = Authority("ours"), Authority("others")
PATIENCE_SECONDS = 120
ANSWER = health_pb2.HealthCheckResponse


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose name fits into a socket's 107 bytes."""
    folder = Path("/tmp") / f"surface-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def printed(*argv: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """run.sh in an environment that has nothing: no HOME, no PATH."""
    return subprocess.run(
        [RUN_SH, *argv], cwd=cwd, env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )


# Flags that print


def test_version(tmp_path: Path) -> None:
    done = printed("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert line.startswith("vllm-grpc-backend ")
    assert ", vLLM 0.32." in line


def test_help(tmp_path: Path) -> None:
    done = printed("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("--addr", "--tls-cert", "BACKEND_TLS_CERT", "LOCALAI_GRPC_AUTH_TOKEN", "exit status"):
        assert word in done.stdout


def test_check(tmp_path: Path, scripted: Path) -> None:
    done = printed("--check", str(scripted), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert rows["can serve"].strip() == "yes"
    assert rows["callers need"].strip() == "nothing"
    assert rows["--frontends"].strip() == "1"
    assert "hermes" in rows["parsers"]
    assert not any(tmp_path.iterdir())


def test_check_of_what_cannot_be_loaded(tmp_path: Path) -> None:
    done = printed("--check", str(tmp_path), cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].split() == ["can", "serve:", "no"]
    assert done.stderr.splitlines()[-1].startswith(f"backend: {tmp_path}: Model: {tmp_path} has no config.json")


def test_check_of_a_broken_installation(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(
        "raise ImportError('libcuda.so.1: cannot open shared object file')\n"
    )
    done = printed("--check", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "backend: vLLM can't be imported: ImportError: libcuda.so.1: cannot open shared object file"
    )


def test_check_of_flags(tmp_path: Path) -> None:
    done = printed("--check", "--tls-cert", "none.pem", "--tls-key", "none.key", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["backend: --tls-cert none.pem: No such file or directory"]


@pytest.mark.parametrize("flag", ["--addr", "--metrics-addr"])
def test_check_of_an_address_that_is_taken(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addr = f"127.0.0.1:{taken.getsockname()[1]}"
        done = printed("--check", flag, addr, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"cannot listen on {addr}: Address already in use")


# TLS


def greets(addr: str, authority: Authority) -> bool:
    credentials = grpc.ssl_channel_credentials(authority.cert)
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost"))
    with grpc.secure_channel(addr, credentials, options) as channel:
        try:
            reply: Any = pb_grpc.BackendStub(channel).Health(pb.HealthMessage(), timeout=5)
        except grpc.RpcError:
            return False
        return bool(reply.message == b"OK")


def test_tls_and_a_renewal(tmp_path: Path) -> None:
    cert, key = OURS.issue("server").write(tmp_path, "server")
    addr = f"127.0.0.1:{free_port()}"
    argv = ["--addr", addr, "--tls-cert", str(cert), "--tls-key", str(key)]
    with Backend(addr=addr, argv=argv) as backend:
        eventually(lambda: greets(addr, OURS), 10, "Health over TLS")
        assert not greets(addr, OTHERS)
        cert.write_bytes(b"half a certificate")
        assert greets(addr, OURS)
        assert f"--tls-cert {cert}: holds no certificate" in backend.stderr
        OTHERS.issue("server").write(tmp_path, "server")
        assert greets(addr, OTHERS)
        assert not greets(addr, OURS)
        with pytest.raises(grpc.RpcError):
            backend.call("Health", pb.HealthMessage(), timeout=5)
        assert backend.stop().status == 0


def test_a_certificate_that_has_expired(tmp_path: Path) -> None:
    cert, key = OURS.issue("server", first=-3, last=-1).write(tmp_path, "server")
    addr = f"127.0.0.1:{free_port()}"
    argv = ["--addr", addr]
    with Backend(addr=addr, argv=argv, env={"BACKEND_TLS_CERT": str(cert), "BACKEND_TLS_KEY": str(key)}) as backend:
        assert backend.wait_for_exit(10) == 2
        (line,) = backend.stderr.splitlines()
        assert line.startswith(f"backend: --tls-cert {cert}: expired on ")


# Who can reach it


EVERYWHERE = "0.0.0.0"  # noqa: S104  # what is warned of


@pytest.mark.parametrize(
    ("host", "environ", "warned"),
    [(EVERYWHERE, {}, True), (EVERYWHERE, {"LOCALAI_GRPC_AUTH_TOKEN": "word"}, False), ("127.0.0.1", {}, False)],
)
def test_a_warning_where_anyone_may_call(host: str, environ: dict[str, str], warned: bool) -> None:
    addr = f"{host}:{free_port()}"
    with Backend(addr=addr, env=environ) as backend:
        eventually(lambda: "listening on" in backend.stderr, 10, "the port")
        assert backend.stop().status == 0  # all is written that there is to say
        assert ("can use this server" in backend.stderr) is warned
        assert "word" not in backend.stderr.split()


def test_a_unix_socket_comes_private_and_goes_with_the_server(short_path: Path) -> None:
    path = short_path / "socket"
    with Backend(addr=f"unix:{path}") as backend:
        backend.wait_for_health()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with grpc.insecure_channel(backend.addr) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == ANSWER.SERVING
            assert backend.stop().status == 0
        assert not path.exists()


# Probes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_watch_hears_of_the_end_before_it_comes(number: signal.Signals) -> None:
    with Backend() as backend:
        backend.wait_for_health()
        with grpc.insecure_channel(backend.addr) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watches = {
                name: health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", "backend.Backend")
            }
            for watch in watches.values():
                assert next(watch).status == ANSWER.SERVING
            model = health_pb2.HealthCheckRequest(service="backend.Backend/model")
            assert health.Check(model).status == ANSWER.NOT_SERVING
            backend.signal_leader(number)
            for watch in watches.values():
                assert next(watch).status == ANSWER.NOT_SERVING
            assert backend.exit_status is None
            for watch in watches.values():
                with pytest.raises(grpc.RpcError) as raised:
                    next(watch)
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert backend.wait_for_exit(STOP_SECONDS) == 0


# Log lines


def test_json_log_lines() -> None:
    with Backend(env={"BACKEND_LOG_FORMAT": "json"}) as backend:
        backend.wait_for_health()
        eventually(lambda: "vLLM imported" in backend.stderr, 60, "the import of vLLM")
        assert not backend.load(pb.ModelOptions(Model="two\nlines")).success
        with backend.connection() as stub, pytest.raises(grpc.RpcError):
            stub.Predict(pb.PredictOptions(Prompt="a"))
        assert backend.stop().status == 0
        ours = [json.loads(line) for line in backend.stderr.splitlines() if line.startswith("{")]
        assert ours[0]["message"].startswith("listening on ")
        assert {"backend", "backend.slow_import"} <= {line["logger"] for line in ours}
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in ours)
        assert not [line for line in backend.stderr.splitlines() if "[backend" in line]


# All of it, with a model


def test_a_model_behind_mutual_tls_and_a_token(tmp_path: Path, scripted: Path) -> None:
    cert, key = OURS.issue("server").write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(OURS.cert)
    client = OURS.issue("client")
    addr = f"127.0.0.1:{free_port()}"
    environ = {
        "BACKEND_TLS_CERT": str(cert),
        "BACKEND_TLS_KEY": str(key),
        "BACKEND_TLS_CLIENT_CA": str(tmp_path / "ca.pem"),
        "LOCALAI_GRPC_AUTH_TOKEN": "word",
    }
    credentials = grpc.ssl_channel_credentials(OURS.cert, client.key, client.cert)
    metadata = (("authorization", "Bearer word"),)
    with Backend(addr=addr, env=environ) as backend, grpc.secure_channel(addr, credentials) as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
        stub, health = pb_grpc.BackendStub(channel), health_pb2_grpc.HealthStub(channel)
        name = health_pb2.HealthCheckRequest(service="backend.Backend/model")
        model = health.Watch(name, metadata=metadata)
        process = health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert (next(model).status, next(process).status) == (ANSWER.NOT_SERVING, ANSWER.SERVING)
        result = stub.LoadModel(model_options(scripted, *PARSERS), metadata=metadata, timeout=PATIENCE_SECONDS)
        assert result.success, result.message
        assert next(model).status == ANSWER.SERVING
        request = pb.PredictOptions(Prompt="Hello there", Tokens=5)
        replies = list(stub.PredictStream(request, metadata=metadata, timeout=PATIENCE_SECONDS))
        assert replies[-1].tokens > 0
        with pytest.raises(grpc.RpcError) as raised:
            stub.Predict(request, timeout=PATIENCE_SECONDS)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        (core,) = backend.engine_cores()
        core.kill()
        assert (next(model).status, next(process).status) == (ANSWER.NOT_SERVING, ANSWER.NOT_SERVING)
        assert backend.wait_for_exit(DEATH_SECONDS) == 1
