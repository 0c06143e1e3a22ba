"""A server whose parent goes away without a word ends, with all that it has started."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import RUN_SH, Backend, eventually
from tests.process.wire import ENDLESS, PARSERS, model_options, predict_options

INTERVAL = 2.0
GONE_SECONDS = 5.0


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A program that starts run.sh with its own arguments, and waits for it."""
    path = tmp_path / "parent"
    path.write_text(f'#!/bin/bash\n"{RUN_SH}" "$@" &\necho $! >"{tmp_path}/server"\nwait $!\n')
    path.chmod(0o755)
    return path


def server_of(parent: Path) -> psutil.Process:
    return psutil.Process(int((parent.parent / "server").read_text()))


@pytest.fixture
def no_server_left(parent: Path) -> Iterator[None]:
    yield
    if (parent.parent / "server").exists() and psutil.pid_exists(int((parent.parent / "server").read_text())):
        server_of(parent).kill()


@pytest.mark.parametrize("interval", [None, "100ms"])
def test_server_without_a_parent_ends(parent: Path, no_server_left: None, interval: str | None) -> None:
    environment = {} if interval is None else {"LOCALAI_BACKEND_PARENT_WATCH_INTERVAL": interval}
    with Backend(run_sh=parent, env=environment) as backend:
        backend.wait_for_health()
        server = server_of(parent)
        backend.processes()
        time.sleep(INTERVAL + 0.5)  # it has looked, and stays
        assert server.is_running()
        backend.signal_leader(signal.SIGKILL)
        assert backend.wait_for_exit(GONE_SECONDS) == -signal.SIGKILL
        started = time.monotonic()
        eventually(lambda: not backend.processes(), GONE_SECONDS, "the server is gone")
        print(f"interval {interval}: gone {time.monotonic() - started:.1f} s after its parent")
        assert backend.last_stderr_line.startswith(f"backend: the parent process {backend.pid} is gone")


def test_watch_that_is_switched_off(parent: Path, no_server_left: None) -> None:
    environment = {"LOCALAI_BACKEND_PARENT_WATCH": "off", "LOCALAI_BACKEND_PARENT_WATCH_INTERVAL": "100ms"}
    with Backend(run_sh=parent, env=environment) as backend:
        backend.wait_for_health()
        server = server_of(parent)
        backend.signal_leader(signal.SIGKILL)
        backend.wait_for_exit(GONE_SECONDS)
        time.sleep(1)
        assert backend.call("Health", pb.HealthMessage(), timeout=2).message == b"OK"
        server.terminate()
        eventually(lambda: not backend.processes(), GONE_SECONDS, "the server is gone")


def test_interval_that_cannot_be_used() -> None:
    with Backend(env={"LOCALAI_BACKEND_PARENT_WATCH_INTERVAL": "soon"}) as backend:
        assert backend.wait_for_exit(10) == 2
        assert "LOCALAI_BACKEND_PARENT_WATCH_INTERVAL soon" in backend.last_stderr_line
        assert len(backend.stderr.splitlines()) == 1


def test_server_under_streams_without_a_parent(parent: Path, no_server_left: None, scripted: Path) -> None:
    with Backend(run_sh=parent) as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        with backend.connection() as stub:
            stream = stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60)
            next(stream)
            backend.processes()
            backend.signal_leader(signal.SIGKILL)
            started = time.monotonic()
            with pytest.raises(grpc.RpcError) as raised:
                list(stream)
            assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
            eventually(lambda: not backend.processes(), GONE_SECONDS, "all processes are gone")
            print(f"all gone {time.monotonic() - started:.1f} s after the parent")
            assert f"the parent process {backend.pid} is gone" in backend.last_stderr_line
