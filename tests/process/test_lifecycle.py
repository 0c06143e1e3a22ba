"""Loads that fail, are cancelled, wait, and follow each other; and every way in which a server with an engine ends.

The first part shares one server and leaves no model behind from test to test, unless a test says so.
"""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.models import ensure
from tests.models.script import line
from tests.process.orchestrator import (
    DEATH_SECONDS,
    FREE_SECONDS,
    PATIENCE_SECONDS,
    PROBE_SECONDS,
    Backend,
    Heart,
    Watch,
    eventually,
    name,
)
from tests.process.wire import ENDLESS, PARSERS, content, model_options, predict_options

TURNS = int(os.environ.get("RELOAD_TURNS", "3"))
STREAMS = 4
# How soon after a cancelled load its processes are gone.
CANCEL_SECONDS = 5.0
# How soon after the death of an engine all its streams have ended.
CAUSE_SECONDS = 1.0
# An engine process takes a few seconds from its spawn to its first message; longer where vLLM is still being imported.
APPEAR_SECONDS = 60.0


class Streams:
    """Streams that would go on for long, while the block runs.

    Attributes:
        count: how many.
        ends: how they ended: code and details each, once the block is left.
        last_end: when the last of them did (`time.monotonic`).

    """

    def __init__(self, backend: Backend, count: int = STREAMS) -> None:
        self._backend = backend
        self._pool = ThreadPoolExecutor(count)
        self._flowing = threading.Semaphore(0)
        self.count = count
        self.ends: list[tuple[grpc.StatusCode, str]] = []
        self.last_end = 0.0

    def __enter__(self) -> Self:
        self._futures = [self._pool.submit(self._stream) for _ in range(self.count)]
        for _ in range(self.count):
            assert self._flowing.acquire(timeout=60)
        return self

    def __exit__(self, *exc: object) -> None:
        self.ends = [future.result() for future in self._futures]
        self._pool.shutdown()

    def unfinished(self) -> int:
        """How many still run."""
        return sum(not future.done() for future in self._futures)

    def check_unavailable(self) -> None:
        """They ended as they must when the engine goes."""
        for code, details in self.ends:
            assert code == grpc.StatusCode.UNAVAILABLE, (code, details)
            assert details

    def _stream(self) -> tuple[grpc.StatusCode, str]:
        with self._backend.connection() as stub:
            try:
                for index, _ in enumerate(stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60)):
                    if index == 3:
                        self._flowing.release()
            except grpc.RpcError as error:
                self.last_end = max(self.last_end, time.monotonic())
                return error.code(), error.details() or ""
            return grpc.StatusCode.OK, ""


@contextlib.contextmanager
def loading(backend: Backend) -> Iterator["grpc.Future[pb.Result]"]:
    """LoadModel on its way, so far that its engine process is there.

    Of SmolLM2, which takes 2.5 s and more from there on: an engine that was warm has the scripted model within 1 s.
    """
    with backend.connection() as stub:
        future = stub.LoadModel.future(model_options(ensure("smollm2")), timeout=120)
        eventually(lambda: backend.engine_cores() or future.done(), APPEAR_SECONDS, "an engine process")
        # It shows its name before anything else; this is in the midst of its start.
        time.sleep(0.5)
        assert not future.done()
        yield future


def plain(backend: Backend) -> str:
    """The answer to a simple question."""
    reply: pb.Reply = backend.call("Predict", predict_options(line("plain")))
    return reply.message.decode()


def check_loaded(backend: Backend) -> None:
    """One engine is there, and it answers right."""
    assert backend.status().state == pb.StatusResponse.READY
    assert len(backend.engine_cores()) == 1
    assert plain(backend) == line("plain").content


def check_unloaded(backend: Backend) -> None:
    """Nothing of an engine is left, and the server knows."""
    assert [name(process) for process in backend.engine_processes()] == []
    assert backend.status().state == pb.StatusResponse.UNINITIALIZED
    for rpc in ("Predict", "TokenizeString"):
        with pytest.raises(grpc.RpcError) as raised:
            backend.call(rpc, predict_options(line("plain")))
        assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert raised.value.details() == "model not loaded"


def free(backend: Backend, patience: float = FREE_SECONDS) -> float:
    """Free, by default in the orchestrator's patience; returns the seconds it took."""
    started = time.monotonic()
    assert backend.call("Free", pb.HealthMessage(), timeout=patience).success
    return time.monotonic() - started


def open_descriptors(process: psutil.Process) -> int:
    """How many stay open: the connections of callers, of which one comes every 50 ms, are not always all closed."""
    counts = []
    for _ in range(20):
        counts.append(process.num_fds())
        time.sleep(0.02)
    return min(counts)


@pytest.fixture(scope="module", autouse=True)
def beating(heart: Heart) -> Heart:
    """Health of the shared server is called during all that happens to it."""
    return heart


@pytest.fixture
def own() -> Iterator[Backend]:
    """A server for one test, which is to end it."""
    with Backend() as backend:
        backend.wait_for_health()
        yield backend


# Loads that fail


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"EngineArgs": '{"max_model_length": 1024}'}, ("EngineArgs", "max_model_length", "max_model_len")),
        ({"EngineArgs": "{broken"}, ("EngineArgs", "JSON")),
        ({"Options": ["tool_praser:hermes"]}, ("Options", "tool_praser", "tool_parser")),
        ({"Options": ["--max-model-length:1024"]}, ("Options", "--max-model-length", "--max-model-len")),
        ({"MaxModelLen": -5}, ("MaxModelLen", "-5")),
        ({"DType": "float23"}, ("DType", "float23")),
        ({"Model": "", "ModelFile": ""}, ("Model",)),
        ({"Model": "/no/such/folder", "ModelFile": ""}, ("Model", "/no/such/folder")),
        ({"Model": "/etc/hostname", "ModelFile": "/etc/hostname"}, ("Model", "/etc/hostname")),
    ],
)
def test_option_that_cannot_be_used(
    backend: Backend, scripted: Path, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    options = model_options(scripted)
    for field in fields:
        options.ClearField(field)
    options.MergeFrom(pb.ModelOptions(**fields))
    result = backend.load(options)
    assert not result.success
    for word in words:
        assert word in result.message
    check_unloaded(backend)


def test_folder_whose_configuration_is_broken(backend: Backend, scripted: Path, tmp_path: Path) -> None:
    shutil.copytree(scripted, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{broken")
    result = backend.load(model_options(tmp_path / "model"))
    assert not result.success
    assert "JSON" in result.message or "json" in result.message
    check_unloaded(backend)


def test_tool_parser_that_does_not_exist(backend: Backend, scripted: Path) -> None:
    result = backend.load(model_options(scripted, "tool_parser:hermse"))
    assert not result.success
    assert "hermse" in result.message
    check_unloaded(backend)


def test_weights_that_are_cut_off(backend: Backend, scripted: Path, tmp_path: Path) -> None:
    shutil.copytree(scripted, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    result = backend.load(model_options(tmp_path / "model"))
    print(f"message: {result.message}")
    assert not result.success
    assert "safetensor" in result.message.lower()
    assert "engine core" not in result.message.lower()
    assert "\n" not in result.message
    check_unloaded(backend)


# Loads that go well; the first of them follows those that failed


def test_free_without_a_model(backend: Backend) -> None:
    free(backend)
    check_unloaded(backend)


@pytest.mark.timeout(300 + 60 * TURNS)
def test_load_and_free_in_turns(backend: Backend, scripted: Path) -> None:
    server = psutil.Process(backend.pid)
    descriptors: list[int] = []
    for turn in range(1, TURNS + 1):
        started = time.monotonic()
        result = backend.load(model_options(scripted, *PARSERS))
        assert result.success, result.message
        load_seconds = time.monotonic() - started
        check_loaded(backend)
        assert backend.left_files()
        free_seconds = free(backend, PATIENCE_SECONDS)
        check_unloaded(backend)
        assert backend.left_files() == []
        descriptors.append(open_descriptors(server))
        print(
            f"turn {turn}: load {load_seconds:.1f} s, Free {free_seconds:.1f} s,"
            f" then RSS {backend.rss() / 2**20:.0f} MiB, {descriptors[-1]} descriptors, {server.num_threads()} threads"
        )
    # The first turn may open what stays open.
    assert max(descriptors[1:], default=0) - min(descriptors[1:], default=0) <= 2


def test_other_options_replace_the_model_under_its_streams(backend: Backend, scripted: Path) -> None:
    assert backend.load(model_options(scripted, *PARSERS)).success
    (before,) = backend.engine_cores()
    with Watch(backend) as watch:
        with Streams(backend) as streams:
            result = backend.load(model_options(scripted, *PARSERS, MaxModelLen=512))
        assert result.success, result.message
    streams.check_unavailable()
    assert watch.most_engines == 1
    assert not watch.failures
    assert not before.is_running()
    check_loaded(backend)
    with pytest.raises(grpc.RpcError) as raised:
        backend.call("Predict", pb.PredictOptions(Prompt="fox " * 1000))
    assert "512" in (raised.value.details() or "")


def test_free_under_streams_also_when_its_caller_goes_away(backend: Backend) -> None:
    # The model of the test before.
    with Streams(backend) as streams:
        with backend.connection() as stub, pytest.raises(grpc.RpcError) as raised:
            stub.Free(pb.HealthMessage(), timeout=0.05)
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        # The next one finds no half engine: it waits for the end of this one.
        print(f"Free with {STREAMS} streams in flight took {free(backend):.1f} s")
        check_unloaded(backend)
    streams.check_unavailable()


def test_free_under_requests_of_which_each_has_come_to_another_step(backend: Backend, scripted: Path) -> None:
    request = predict_options(line("plain"), Tokens=1)
    request.Messages[-1].content += " fox" * 1000  # so that some are being read

    def ask() -> tuple[grpc.StatusCode, str | None]:
        with backend.connection() as stub:
            while True:
                try:
                    stub.Predict(request, timeout=30)
                except grpc.RpcError as error:
                    return error.code(), error.details()

    ends: set[tuple[grpc.StatusCode, str | None]] = set()
    for _ in range(2):
        assert backend.load(model_options(scripted, *PARSERS)).success
        with ThreadPoolExecutor(16) as pool:
            asking = [pool.submit(ask) for _ in range(16)]
            time.sleep(1)
            free(backend)
            ends |= {each.result() for each in asking}
    assert (grpc.StatusCode.UNAVAILABLE, "the engine is being shut down") in ends
    assert ends <= {
        (grpc.StatusCode.UNAVAILABLE, "the engine is being shut down"),
        (grpc.StatusCode.FAILED_PRECONDITION, "model not loaded"),
    }


def test_free_of_an_engine_that_hangs(backend: Backend, scripted: Path) -> None:
    assert backend.load(model_options(scripted, *PARSERS)).success
    with Streams(backend) as streams:
        for process in backend.engine_cores():
            process.suspend()
        print(f"Free of an engine that hangs took {free(backend):.1f} s")
        check_unloaded(backend)
    # The server stays, so that nothing else would end them.
    streams.check_unavailable()


# Loads that are given up


def test_load_that_its_client_cancels(backend: Backend) -> None:
    with loading(backend) as load:
        load.cancel()
        started = time.monotonic()
        eventually(lambda: not backend.engine_processes(), CANCEL_SECONDS, "no engine process")
        print(f"processes of a cancelled load gone after {time.monotonic() - started:.1f} s")
        eventually(
            lambda: backend.status().state == pb.StatusResponse.UNINITIALIZED, PATIENCE_SECONDS, "the server knows"
        )
    check_unloaded(backend)


def test_free_ends_the_load_that_runs_and_those_that_wait(backend: Backend, scripted: Path) -> None:
    with loading(backend) as load, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(backend.load, model_options(scripted, *PARSERS, MaxModelLen=512))
        time.sleep(0.5)  # it has arrived
        print(f"Free during a load took {free(backend):.1f} s")
        check_unloaded(backend)
        for result in (load.result(timeout=PROBE_SECONDS), waiting.result(timeout=PROBE_SECONDS)):
            assert not result.success
            assert "cancelled" in result.message


def test_loads_wait_for_their_turn_also_after_one_that_was_given_up(backend: Backend, scripted: Path) -> None:
    options = model_options(scripted, *PARSERS)
    with Watch(backend) as watch, ThreadPoolExecutor(2) as pool:
        with loading(backend) as load:
            # As the orchestrator does when a user goes away: the call ends, Free follows at once.
            load.cancel()
            free(backend)
        # And the next users come, two at a time.
        results = list(pool.map(backend.load, (options, options)))
    assert all(result.success for result in results), results
    assert watch.most_engines == 1
    assert not watch.failures
    check_loaded(backend)


# Ends. The model of the test before is loaded.


def test_health_was_answered_all_the_time(heart: Heart) -> None:
    heart.end()
    heart.check()


def test_sigterm_under_streams(backend: Backend) -> None:
    assert content(backend.stream(predict_options(line("plain")))) == line("plain").content
    with Streams(backend) as streams:
        stop = backend.stop()
    assert stop.status == 0, backend.last_stderr_line
    assert not stop.killed
    streams.check_unavailable()
    assert backend.left() == []


@pytest.mark.parametrize("to_group", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["group", "leader"])
def test_sigterm_during_a_load(own: Backend, to_group: bool) -> None:
    with loading(own) as load:
        own.processes()
        started = time.monotonic()
        (own.signal_group if to_group else own.signal_leader)(signal.SIGTERM)
        status = own.wait_for_exit(CANCEL_SECONDS)
        print(f"exit status {status} after {time.monotonic() - started:.1f} s")
        # The server is to end its processes before itself: nobody looks for them later.
        assert own.left() == []
        assert status == 0
        assert load.done() or load.exception(timeout=PROBE_SECONDS)


@pytest.mark.parametrize("victim", ["EngineCore", pytest.param("Worker", marks=pytest.mark.slow)])
def test_engine_that_dies_under_streams(own: Backend, scripted: Path, victim: str) -> None:
    apart = json.dumps({"distributed_executor_backend": "mp"} if victim == "Worker" else {})
    assert own.load(model_options(scripted, *PARSERS, EngineArgs=apart)).success
    (process,) = [process for process in own.children() if victim in name(process)]
    with Streams(own) as streams:
        started = time.monotonic()
        process.kill()
        eventually(lambda: not health(own), DEATH_SECONDS, "Health says so")
        print(f"Health failed {time.monotonic() - started:.1f} s after the death")
        status = own.wait_for_exit(DEATH_SECONDS)
        print(f"exit status {status} after {time.monotonic() - started:.1f} s: {own.last_stderr_line}")
    print(f"the last of {streams.count} streams ended {streams.last_end - started:.1f} s after the death")
    streams.check_unavailable()
    assert streams.last_end - started < CAUSE_SECONDS
    assert status > 0
    assert own.last_stderr_line.startswith("backend: the engine died: ")
    # Killed by signal 9 there are no last words; what is known is who.
    assert victim in own.last_stderr_line or str(process.pid) in own.last_stderr_line
    # Who waits for an answer hears the same.
    assert {f"backend: {details}" for _, details in streams.ends} == {own.last_stderr_line}
    assert own.left() == []


def test_engine_that_dies_idle(own: Backend, scripted: Path) -> None:
    assert own.load(model_options(scripted, *PARSERS)).success
    (process,) = own.engine_cores()
    process.kill()
    assert own.wait_for_exit(DEATH_SECONDS) > 0
    assert own.last_stderr_line == f"backend: the engine died: engine process {process.pid} was killed"


def health(backend: Backend) -> bool:
    """Whether Health says OK."""
    try:
        backend.call("Health", pb.HealthMessage(), timeout=PROBE_SECONDS)
    except grpc.RpcError:
        return False
    return True
