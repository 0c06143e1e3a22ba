"""Several serving processes on one port over one engine: whoever is asked, the server behaves as one."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import pytest

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.models import ensure
from tests.models.adapters import ANSWERS, QUESTION
from tests.models.script import line
from tests.process.orchestrator import (
    DEATH_SECONDS,
    FREE_SECONDS,
    PROBE_SECONDS,
    STOP_SECONDS,
    Backend,
    connect,
    eventually,
    free_port,
    name,
)
from tests.process.test_lifecycle import loading
from tests.process.test_metrics import total
from tests.process.wire import ENDLESS, PARSERS, content, model_options, predict_options

# How often a new connection is tried until it has come to the process that is wanted.
TRIES = 200
LISTEN_SECONDS = 20.0


class Frontends:
    """A server of several processes, and which of them a connection has come to.

    Attributes:
        backend: the server.
        metrics: the URL of its metrics.

    """

    def __init__(self, backend: Backend, count: int, metrics: str) -> None:
        self.backend = backend
        self.metrics = metrics
        self._port = int(backend.addr.rpartition(":")[2])
        eventually(lambda: len(self.pids()) == count, LISTEN_SECONDS, f"{count} processes listen")

    def pids(self) -> list[int]:
        """Of all that listen on the port, the main process first."""
        found = []
        for process in self.backend.processes():
            with contextlib.suppress(psutil.Error):
                listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
                if any(connection.laddr.port == self._port for connection in listening):
                    found.append(process.pid)
        return sorted(found, key=lambda pid: pid != self.backend.pid)

    @contextlib.contextmanager
    def each(self) -> Iterator[dict[int, pb_grpc.BackendStub]]:
        """A stub to each process, by its id."""
        wanted = set(self.pids())
        with contextlib.ExitStack() as stack:
            stubs: dict[int, pb_grpc.BackendStub] = {}
            for _ in range(TRIES):
                if stubs.keys() == wanted:
                    break
                before = self._served()
                trial = contextlib.ExitStack()
                stub = trial.enter_context(connect(self.backend.addr))
                with contextlib.suppress(grpc.RpcError):  # a token may be missing
                    stub.Health(pb.HealthMessage(), timeout=PROBE_SECONDS)
                (pid,) = self._new(before)
                if pid in stubs:
                    trial.close()
                else:
                    stubs[pid] = stub
                    stack.push(trial)
            assert stubs.keys() == wanted
            yield stubs

    def _served(self) -> set[tuple[int, Any]]:
        found = set()
        for pid in self.pids():
            with contextlib.suppress(psutil.Error):
                for connection in psutil.Process(pid).net_connections("tcp"):
                    if connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == self._port:
                        found.add((pid, connection.raddr))
        return found

    def _new(self, before: set[tuple[int, Any]]) -> set[int]:
        return {pid for pid, _ in self._served() - before}


@contextlib.contextmanager
def running(count: int = 2, **env: str) -> Iterator[Frontends]:
    """A server of so many processes, without a model."""
    metrics = f"127.0.0.1:{free_port()}"
    with Backend(env={"BACKEND_FRONTENDS": str(count), "BACKEND_METRICS_ADDR": metrics, **env}) as backend:
        yield Frontends(backend, count, f"http://{metrics}/metrics")


class EachStreams:
    """An endless stream on each process while the block runs; `ends` has how they ended, by process."""

    def __init__(self, frontends: Frontends, request: pb.PredictOptions | None = None) -> None:
        self._frontends = frontends
        self._request = request or predict_options(line("long"), **ENDLESS)
        self.ends: dict[int, tuple[grpc.StatusCode, str]] = {}
        self.texts: dict[int, str] = {}

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        stubs = self._stack.enter_context(self._frontends.each())
        self._pool = ThreadPoolExecutor(len(stubs))
        flowing = threading.Semaphore(0)
        self._futures = [self._pool.submit(self._stream, pid, stub, flowing) for pid, stub in stubs.items()]
        for _ in stubs:
            assert flowing.acquire(timeout=30)
        return self

    def __exit__(self, *exc: object) -> None:
        for future in self._futures:
            future.result(timeout=60)
        self._pool.shutdown()
        self._stack.close()

    def _stream(self, pid: int, stub: pb_grpc.BackendStub, flowing: threading.Semaphore) -> None:
        replies = []
        try:
            for reply in stub.PredictStream(self._request, timeout=60):
                replies.append(reply)
                if len(replies) == 3:
                    flowing.release()
            self.ends[pid] = grpc.StatusCode.OK, ""
        except grpc.RpcError as error:
            self.ends[pid] = error.code(), error.details() or ""
        self.texts[pid] = content(replies)


def on_each(frontends: Frontends, ask: Callable[[pb_grpc.BackendStub], Any]) -> list[Any]:
    """What `ask` returns of each process, or the status and text that it ends with."""
    found = []
    with frontends.each() as stubs:
        for stub in stubs.values():
            try:
                found.append(ask(stub))
            except grpc.RpcError as error:
                found.append((error.code(), error.details()))
    return found


def same(answers: Sequence[Any]) -> Any:
    """The one answer of all."""
    assert all(answer == answers[0] for answer in answers), answers
    return answers[0]


def predict(stub: pb_grpc.BackendStub, **fields: Any) -> str:
    reply: pb.Reply = stub.Predict(predict_options(line("plain"), **fields), timeout=30)
    return reply.message.decode()


# One server of three for all that leaves it as it was, or says so.


@pytest.fixture(scope="module")
def three() -> Iterator[Frontends]:
    with running(3) as frontends:
        yield frontends


def test_without_a_model_all_answer_alike(three: Frontends) -> None:
    refusal = (grpc.StatusCode.FAILED_PRECONDITION, "model not loaded")
    assert same(on_each(three, predict)) == refusal
    assert same(on_each(three, lambda stub: stub.GetMetrics(pb.MetricsRequest()))) == refusal
    assert same(on_each(three, lambda stub: stub.Health(pb.HealthMessage()).message)) == b"OK"
    assert same(on_each(three, lambda stub: stub.Status(pb.HealthMessage()).state)) == pb.StatusResponse.UNINITIALIZED


def test_a_load_that_fails_through_each(three: Frontends, tmp_path: Path) -> None:
    results = on_each(three, lambda stub: stub.LoadModel(model_options(tmp_path), timeout=60))
    assert not any(result.success for result in results)
    assert same([result.message for result in results])
    assert same(on_each(three, predict))[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_a_model_that_is_loaded_through_one_is_served_by_all(three: Frontends, scripted: Path) -> None:
    with three.each() as stubs:
        frontend = next(pid for pid in stubs if pid != three.backend.pid)
        started = time.monotonic()
        result = stubs[frontend].LoadModel(model_options(scripted, *PARSERS), timeout=120)
        print(f"loaded in {time.monotonic() - started:.1f} s")
        assert result.success, result.message
        before = {pid: sum(psutil.Process(pid).cpu_times()[:2]) for pid in stubs}
        for stub in stubs.values():
            for wanted in ("plain", "long"):
                replies = list(stub.PredictStream(predict_options(line(wanted)), timeout=30))
                assert content(replies) == line(wanted).content
            assert predict(stub) == line("plain").content
        # Each has done the work of its own requests.
        for pid in stubs:
            assert sum(psutil.Process(pid).cpu_times()[:2]) > before[pid]
    assert same(on_each(three, lambda stub: stub.Status(pb.HealthMessage()).state)) == pb.StatusResponse.READY
    assert len(three.backend.engine_cores()) == 1


def test_what_a_process_serves_itself_never_reaches_the_main_one(three: Frontends) -> None:
    """The main process is stopped, and the others go on with their model."""
    with three.each() as stubs:
        three.backend.signal_leader(signal.SIGSTOP)
        try:
            others = [stub for pid, stub in stubs.items() if pid != three.backend.pid]
            assert [predict(stub) for stub in others] == [line("plain").content] * 2
        finally:
            three.backend.signal_leader(signal.SIGCONT)


def test_refusals_are_the_same_on_all(three: Frontends) -> None:
    code, text = same(on_each(three, lambda stub: predict(stub, ModelIdentity="another")))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "model identity mismatch" in text
    code, text = same(on_each(three, lambda stub: stub.Predict(pb.PredictOptions(Prompt="fox " * 9000))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    code, text = same(on_each(three, lambda stub: stub.Embedding(pb.PredictOptions(Embeddings="a"))))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    same(on_each(three, lambda stub: stub.TokenizeString(predict_options(line("plain"))).tokens))
    same(on_each(three, lambda stub: stub.ModelMetadata(pb.ModelOptions()).SerializeToString(deterministic=True)))


def test_status_names_the_processes(three: Frontends) -> None:
    breakdown = three.backend.status().memory.breakdown
    assert "server" in breakdown
    _, second, third = sorted(three.pids(), key=lambda pid: (pid != three.backend.pid, pid))
    for number, pid in ((2, second), (3, third)):
        print(f"frontend {number}: {breakdown[f'frontend {number} {pid}'] / 2**20:.0f} MiB")
        assert breakdown[f"frontend {number} {pid}"] > 100 * 2**20
    assert sum(key.startswith("EngineCore") for key in breakdown) == 1


def test_the_numbers_are_the_sums(three: Frontends) -> None:
    def engine() -> tuple[int, int]:
        found = three.backend.call("GetMetrics", pb.MetricsRequest())
        return found.prompt_tokens_processed, found.tokens_generated

    names = ("backend_prompt_tokens_total", "backend_completion_tokens_total")
    theirs = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")

    def told(of: Sequence[str]) -> list[float]:
        return [total(three.metrics, each) or 0 for each in of]

    def predicted() -> float:
        return total(three.metrics, "backend_rpcs_finished_total", method="Predict", code="OK") or 0

    ours_before, theirs_before, engine_before, calls = told(names), told(theirs), engine(), predicted()
    replies = on_each(three, lambda stub: stub.Predict(predict_options(line("plain")), timeout=30))
    sent = [sum(reply.prompt_tokens for reply in replies), sum(reply.tokens for reply in replies)]
    assert min(sent) > 0
    assert [after - before for after, before in zip(told(names), ours_before, strict=True)] == sent
    assert [after - before for after, before in zip(told(theirs), theirs_before, strict=True)] == sent
    assert [after - before for after, before in zip(engine(), engine_before, strict=True)] == sent
    assert predicted() - calls == 3
    assert total(three.metrics, "backend_rpcs_in_flight", method="Predict") == 0
    eventually(lambda: total(three.metrics, "vllm:num_requests_running") == 0, 5, "the engine is said to be idle")


def test_running_requests_of_all_are_one_gauge(three: Frontends) -> None:
    with three.each() as stubs:
        calls = [stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60) for stub in stubs.values()]
        for call in calls:
            next(call)
        eventually(lambda: total(three.metrics, "vllm:num_requests_running") == 3, 5, "three requests run")
        assert total(three.metrics, "backend_rpcs_in_flight", method="PredictStream") == 3
        for call in calls:
            call.cancel()
        eventually(lambda: total(three.metrics, "backend_rpcs_in_flight", method="PredictStream") == 0, 5, "gone")


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_client_that_goes_away_from_each(three: Frontends, how: str) -> None:
    (engine,) = three.backend.engine_cores()

    def rate() -> float:
        before = sum(engine.cpu_times()[:2])
        time.sleep(0.3)
        return float(sum(engine.cpu_times()[:2]) - before) / 0.3

    idle = rate()
    with three.each() as stubs:
        seconds = 0.5 if how == "deadline" else 60
        request = predict_options(line("long"), **ENDLESS)
        calls = [stub.PredictStream(request, timeout=seconds) for stub in stubs.values()]
        for call in calls:
            next(call)
        if how == "cancel":
            assert rate() > idle + 0.1
            for call in calls:
                call.cancel()
        for call in calls:
            with pytest.raises(grpc.RpcError) as raised:
                list(call)
            wanted = grpc.StatusCode.CANCELLED if how == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED
            assert raised.value.code() is wanted
        eventually(lambda: rate() <= idle + 0.1, 2, "the engine rests")


def test_another_model_under_streams_on_all(three: Frontends, scripted: Path) -> None:
    with EachStreams(three) as streams:
        result = three.backend.load(model_options(scripted, *PARSERS, MaxModelLen=512))
        assert result.success, result.message
    assert {code for code, _ in streams.ends.values()} == {grpc.StatusCode.UNAVAILABLE}
    assert len(same(list(streams.ends.values()))[1]) > 0
    assert same(on_each(three, predict)) == line("plain").content
    code, text = same(on_each(three, lambda stub: stub.Predict(pb.PredictOptions(Prompt="fox " * 1000))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "512" in text


def test_free_under_streams_on_all(three: Frontends) -> None:
    with EachStreams(three) as streams:
        started = time.monotonic()
        assert three.backend.call("Free", pb.HealthMessage(), timeout=FREE_SECONDS).success
        print(f"Free took {time.monotonic() - started:.1f} s")
    assert len(streams.ends) == 3
    assert {code for code, _ in streams.ends.values()} == {grpc.StatusCode.UNAVAILABLE}
    same(list(streams.ends.values()))
    assert same(on_each(three, predict)) == (grpc.StatusCode.FAILED_PRECONDITION, "model not loaded")
    assert three.backend.engine_cores() == []
    assert len(three.pids()) == 3


@pytest.mark.slow
def test_a_load_that_is_given_up(three: Frontends, scripted: Path) -> None:
    with loading(three.backend) as load:
        load.cancel()
    eventually(lambda: not three.backend.engine_cores(), 5, "no engine")
    assert three.backend.load(model_options(scripted, *PARSERS)).success
    assert same(on_each(three, predict)) == line("plain").content


def until_attaching(backend: Backend, load: Any) -> None:
    """Return as soon as a load, which is no more done then, attaches the frontends."""
    deadline = time.monotonic() + 60
    while not any("attaching" in key for key in backend.status().memory.breakdown):
        assert time.monotonic() < deadline
        assert not load.done(), load.result()


def test_an_engine_that_dies_while_the_others_are_attached_fails_the_load(three: Frontends, scripted: Path) -> None:
    with three.backend.connection() as stub:
        load = stub.LoadModel.future(model_options(scripted, *PARSERS, MaxModelLen=256), timeout=120)
        until_attaching(three.backend, load)
        (engine,) = three.backend.engine_cores()
        engine.kill()
        result = load.result(timeout=30)
    assert not result.success
    assert "killed" in result.message
    assert same(on_each(three, predict)) == (grpc.StatusCode.FAILED_PRECONDITION, "model not loaded")


def test_a_load_that_is_given_up_while_the_others_are_attached(three: Frontends, scripted: Path) -> None:
    with three.backend.connection() as stub:
        load = stub.LoadModel.future(model_options(scripted, *PARSERS, MaxModelLen=256), timeout=120)
        until_attaching(three.backend, load)
        load.cancel()
    eventually(lambda: not three.backend.engine_cores(), 10, "no engine")
    assert same(on_each(three, predict)) == (grpc.StatusCode.FAILED_PRECONDITION, "model not loaded")
    assert three.backend.load(model_options(scripted, *PARSERS)).success
    assert same(on_each(three, predict)) == line("plain").content


def test_the_end_waits_for_the_streams_of_all(three: Frontends) -> None:
    """The last of this server: SIGTERM to the group."""
    short = predict_options(line("long"), Tokens=60)  # which a slow machine writes within the five seconds, too
    with EachStreams(three, short) as streams:
        assert three.backend.stop().status == 0
    text = same(list(streams.texts.values()))
    assert len(text) > 20
    assert line("long").content.startswith(text)
    assert {code for code, _ in streams.ends.values()} == {grpc.StatusCode.OK}
    assert three.backend.left() == []


# Servers of their own.


@pytest.fixture
def two(scripted: Path) -> Iterator[Frontends]:
    with running(2) as frontends:
        assert frontends.backend.load(model_options(scripted, *PARSERS)).success
        yield frontends


@pytest.mark.slow
def test_streams_that_do_not_end_are_ended_alike(two: Frontends) -> None:
    with EachStreams(two) as streams:
        stop = two.backend.stop()
    assert (stop.status, stop.killed) == (0, False)
    assert same(list(streams.ends.values())) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
    assert two.backend.left() == []


def test_the_engine_dies_under_streams_on_all(two: Frontends) -> None:
    (engine,) = two.backend.engine_cores()
    with EachStreams(two) as streams:
        engine.kill()
        status = two.backend.wait_for_exit(DEATH_SECONDS)
    assert status > 0
    last = two.backend.last_stderr_line
    assert last == f"backend: the engine died: engine process {engine.pid} was killed"
    assert same(list(streams.ends.values())) == (grpc.StatusCode.UNAVAILABLE, last.removeprefix("backend: "))
    assert two.backend.left() == []


def test_a_frontend_dies_and_the_server_ends_with_it(two: Frontends) -> None:
    main, victim = two.pids()
    with EachStreams(two) as streams:
        two.backend.processes()
        psutil.Process(victim).kill()
        status = two.backend.wait_for_exit(DEATH_SECONDS)
    assert status > 0
    last = two.backend.last_stderr_line
    assert last == f"backend: frontend 2 (process {victim}) was killed by SIGKILL"
    assert streams.ends[main] == (grpc.StatusCode.UNAVAILABLE, last.removeprefix("backend: "))
    assert streams.ends[victim][0] is grpc.StatusCode.UNAVAILABLE
    assert two.backend.left() == []


@pytest.mark.parametrize("moment", ["no model", pytest.param("loading", marks=pytest.mark.slow)])
def test_a_frontend_dies_before_there_is_a_model(moment: str) -> None:
    with running(3) as frontends, contextlib.ExitStack() as stack:
        victim = frontends.pids()[-1]
        if moment == "loading":
            stack.enter_context(loading(frontends.backend))
        frontends.backend.processes()
        psutil.Process(victim).kill()
        assert frontends.backend.wait_for_exit(DEATH_SECONDS) > 0
        assert frontends.backend.last_stderr_line == f"backend: frontend 3 (process {victim}) was killed by SIGKILL"
        assert frontends.backend.left() == []


def test_the_main_process_is_killed_and_nothing_is_left(two: Frontends) -> None:
    with EachStreams(two) as streams:
        two.backend.processes()
        two.backend.signal_leader(signal.SIGKILL)
        eventually(lambda: not two.backend.processes(), 5, "nothing is left")
    assert {code for code, _ in streams.ends.values()} == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.slow
def test_a_frontend_that_hangs_ends_the_server_when_it_matters(two: Frontends) -> None:
    _, victim = two.pids()
    psutil.Process(victim).suspend()
    # A scrape waits for it for a second, and no longer.
    assert total(two.metrics, "backend_state", state="ready") == 1
    with connect_to(two, two.backend.pid) as stub, contextlib.suppress(grpc.RpcError):
        stub.Free(pb.HealthMessage(), timeout=10)
    assert two.backend.wait_for_exit(DEATH_SECONDS) > 0
    last = two.backend.last_stderr_line
    assert last == f"backend: frontend 2 (process {victim}) did not answer within 10 s (detach)"
    # Python's own tracker ends after the server, for a moment without the name that it is known by.
    eventually(lambda: two.backend.left() == [], 2, "nothing is left")


@contextlib.contextmanager
def connect_to(frontends: Frontends, pid: int) -> Iterator[pb_grpc.BackendStub]:
    """A stub to that process, while another may not answer."""
    port = int(frontends.backend.addr.rpartition(":")[2])
    for _ in range(TRIES):
        with connect(frontends.backend.addr) as stub:
            try:
                stub.Health(pb.HealthMessage(), timeout=0.5)
            except grpc.RpcError:
                continue
            served = psutil.Process(pid).net_connections("tcp")
            if any(c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port for c in served):
                yield stub
                return
    raise AssertionError(f"no connection came to {pid}")


def test_limits_hold_over_all(scripted: Path) -> None:
    with running(2, BACKEND_MAX_RUNNING_REQUESTS="1", BACKEND_MAX_WAITING_REQUESTS="2") as frontends:
        assert frontends.backend.load(model_options(scripted, *PARSERS)).success
        with frontends.each() as stubs:
            one, other = stubs.values()
            calls = [one.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60)]
            next(calls[0])
            calls += [other.PredictStream(predict_options(line("plain")), timeout=60) for _ in range(2)]
            time.sleep(0.5)  # they have arrived
            code, text = same(on_each(frontends, predict))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "3 requests run or wait" in text
            for call in calls:
                call.cancel()
        eventually(lambda: on_each(frontends, predict) == [line("plain").content] * 2, 10, "room again")


@pytest.mark.slow
def test_prompt_tokens_that_wait_are_counted_over_all(scripted: Path) -> None:
    limits = {"BACKEND_MAX_RUNNING_REQUESTS": "1", "BACKEND_MAX_WAITING_TOKENS": "300"}
    with running(2, **limits) as frontends:
        assert frontends.backend.load(model_options(scripted, *PARSERS)).success
        with frontends.each() as stubs:
            one, other = stubs.values()
            busy = one.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60)
            next(busy)
            long = other.PredictStream(pb.PredictOptions(Prompt="fox " * 600, Tokens=1), timeout=60)
            time.sleep(0.5)  # it has arrived
            code, text = same(on_each(frontends, predict))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "prompt tokens wait for their prefill, and 300 are admitted" in text
            busy.cancel()
            list(long)
        eventually(lambda: on_each(frontends, predict) == [line("plain").content] * 2, 10, "room again")


@pytest.mark.slow
def test_embeddings_of_all() -> None:
    with running(2) as frontends:
        options = model_options(ensure("minilm"), Embeddings=True)
        options.ContextSize = 256
        result = frontends.backend.load(options)
        assert result.success, result.message
        vectors = on_each(frontends, lambda stub: stub.Embedding(pb.PredictOptions(Embeddings="a fox")).embeddings)
        assert len(vectors[0]) == 384
        for vector in vectors:
            assert list(vector) == pytest.approx(list(vectors[0]), abs=1e-5)


def test_a_port_in_use_is_refused() -> None:
    with running(2) as frontends, Backend(addr=frontends.backend.addr, env={"BACKEND_FRONTENDS": "2"}) as other:
        assert other.wait_for_exit(STOP_SECONDS) == 2
        assert other.last_stderr_line == f"backend: cannot listen on {other.addr}: Address already in use"


def test_a_unix_socket_is_refused(tmp_path: Path) -> None:
    addr = f"unix:{tmp_path}/b.sock"
    with Backend(addr=addr, argv=["--addr", addr, "--frontends", "2"]) as backend:
        assert backend.wait_for_exit(STOP_SECONDS) == 2
        assert backend.last_stderr_line.startswith("backend: --frontends 2: needs HOST:PORT; ")


def test_a_port_that_was_chosen_is_shared_and_nothing_is_left_in_the_temporary_folder(tmp_path: Path) -> None:
    addr = f"127.0.0.1:{free_port()}"
    env = {"TMPDIR": str(tmp_path)}
    with Backend(addr=addr, argv=["--addr", "127.0.0.1:0", "--frontends", "3"], env=env) as backend:

        def told() -> list[str]:
            return [text for text in backend.stderr.splitlines() if "listens on" in text or "listening on" in text]

        lines = eventually(lambda: told() if len(told()) == 3 else None, LISTEN_SECONDS, "three that listen")
        same([text.rpartition(" ")[2] for text in lines])
        (folder,) = tmp_path.glob("backend-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "main").stat().st_mode & 0o777 == 0o600
        assert backend.stop().status == 0
        assert list(tmp_path.iterdir()) == []


def test_one_frontend_is_as_ever() -> None:
    with Backend(env={"BACKEND_FRONTENDS": "1"}) as backend:
        backend.wait_for_health()
        assert [name(process) for process in backend.engine_processes()] == []
        with Backend(addr=backend.addr) as other:
            assert other.wait_for_exit(STOP_SECONDS) == 2


@pytest.mark.slow
def test_data_parallel_ranks_behind_all(scripted: Path) -> None:
    with running(2) as frontends:
        options = model_options(scripted, *PARSERS, EngineArgs=json.dumps({"data_parallel_size": 2}))
        result = frontends.backend.load(options)
        assert result.success, result.message
        assert len(frontends.backend.engine_cores()) == 2
        with frontends.each() as stubs:
            for stub in stubs.values():
                assert [predict(stub) for _ in range(3)] == [line("plain").content] * 3
        assert (total(frontends.metrics, "vllm:request_success_total") or 0) == 6


@pytest.mark.slow
def test_adapters_of_all(scripted: Path) -> None:
    """One of them scaled, which is written for the engine and must outlive no server."""
    lyon = ensure("adapters") / "lyon"
    options = model_options(scripted, *PARSERS, LoraAdapters=[str(lyon), f"weak={lyon}"], LoraScales=[1, 0.25])
    with running(2) as frontends:
        result = frontends.backend.load(options)
        assert result.success, result.message

        def ask(stub: pb_grpc.BackendStub, adapter: str) -> str:
            reply: pb.Reply = stub.Predict(predict_options(QUESTION, Metadata={"lora": adapter}), timeout=30)
            return reply.message.decode()

        assert same(on_each(frontends, lambda stub: ask(stub, "lyon"))) == ANSWERS["lyon"]
        assert same(on_each(frontends, lambda stub: ask(stub, "none"))) == QUESTION.content
        assert same(on_each(frontends, lambda stub: ask(stub, "weak"))) != ANSWERS["lyon"]
        code, text = same(on_each(frontends, lambda stub: ask(stub, "another")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "no adapter 'another' is loaded" in text
