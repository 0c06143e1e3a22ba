"""SIGTERM: what is in flight finishes, what is new is refused, nothing outlasts the orchestrator's patience."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import PROBE_SECONDS, STOP_SECONDS, Backend, eventually
from tests.process.test_lifecycle import Streams, plain
from tests.process.wire import PARSERS, content, model_options, predict_options

STREAMS = 8
# Longer than the streams take, whatever else the machine does.
LONG_DRAIN = "60"
# What the end takes once nothing is waited for: killing, and the last answers.
HURRY_SECONDS = 4.0


@pytest.fixture
def draining(scripted: Path) -> Iterator[Backend]:
    """A server with the scripted model, whose requests get a minute to finish."""
    with Backend(env={"BACKEND_DRAIN_SECONDS": LONG_DRAIN}) as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        yield backend


def refusal(backend: Backend, rpc: str, request: pb.PredictOptions | pb.ModelOptions) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        backend.call(rpc, request, timeout=PROBE_SECONDS)
    return raised.value.code(), raised.value.details() or ""


def test_what_is_in_flight_finishes(draining: Backend, scripted: Path) -> None:
    long = predict_options(line("long"))
    with ThreadPoolExecutor(STREAMS) as pool, draining.connection() as stub:
        first = stub.PredictStream(long, timeout=60)
        next(first)
        answers = [pool.submit(draining.stream, long) for _ in range(STREAMS - 1)]
        time.sleep(0.5)  # they have arrived
        started = time.monotonic()
        draining.signal_group(signal.SIGTERM)
        refused = (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        eventually(lambda: draining.status().state == pb.StatusResponse.BUSY, PROBE_SECONDS, "the server drains")
        for rpc in ("Predict", "TokenizeString"):
            assert refusal(draining, rpc, predict_options(line("plain"))) == refused
        assert refusal(draining, "LoadModel", model_options(scripted)) == refused
        assert draining.call("Health", pb.HealthMessage(), timeout=PROBE_SECONDS).message == b"OK"
        list(first)
        for answer in answers:
            assert content(answer.result()) == line("long").content
        print(f"{STREAMS} streams in flight finished {time.monotonic() - started:.1f} s after SIGTERM")
        done = time.monotonic()
        assert draining.wait_for_exit(STOP_SECONDS) == 0
        print(f"exit {time.monotonic() - done:.1f} s after the last of them")
    assert draining.left() == []


def test_second_signal_hurries(draining: Backend) -> None:
    with Streams(draining) as streams:
        draining.signal_group(signal.SIGTERM)
        time.sleep(1)
        assert draining.exit_status is None
        assert streams.unfinished() == streams.count
        started = time.monotonic()
        draining.signal_group(signal.SIGTERM)
        assert draining.wait_for_exit(HURRY_SECONDS) == 0
        print(f"exit {time.monotonic() - started:.1f} s after the second SIGTERM")
    streams.check_unavailable()
    assert draining.left() == []


def test_second_signal_hurries_a_shutdown_too(draining: Backend) -> None:
    """No request is in flight: what is cut short is the engine's own shutdown."""
    assert plain(draining) == line("plain").content
    draining.signal_group(signal.SIGTERM)
    draining.signal_group(signal.SIGTERM)
    assert draining.wait_for_exit(HURRY_SECONDS) == 0
    assert draining.left() == []


def test_streams_that_do_not_end_are_ended(scripted: Path) -> None:
    with Backend() as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        with Streams(backend) as streams:
            stop = backend.stop()
        assert (stop.status, stop.killed) == (0, False)
        assert stop.seconds > 5
        streams.check_unavailable()
        assert {details for _, details in streams.ends} == {"the server is shutting down"}
        assert backend.left() == []


def test_engine_that_hangs_is_killed_in_time(scripted: Path) -> None:
    """One that is stopped answers nothing, SIGTERM included."""
    with Backend() as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        with Streams(backend) as streams:
            for process in backend.engine_cores():
                process.suspend()
            stop = backend.stop()
        assert (stop.status, stop.killed) == (0, False)
        streams.check_unavailable()
        assert backend.left() == []
