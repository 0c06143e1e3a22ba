"""Machines that are lost: what becomes of streams and of the head, and that the cluster serves again by itself.

Nobody touches the followers: `run.sh worker` sees to them. The tests are the orchestrator, which spawns a head again at
the same place and loads again.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.cluster.conftest import follower, head, heavy, needs_namespaces
from tests.cluster.lines import PATIENCE, answers, expected, in_background, options
from tests.cluster.network import Node
from tests.models.script import line
from tests.process.orchestrator import Backend, eventually, free_port, name
from tests.process.wire import ENDLESS, predict_options

pytestmark = [needs_namespaces, pytest.mark.timeout(600)]

# What is promised.
STREAM_SECONDS = 5.0
RECOVERY_SECONDS = 60.0
# How long a cable is out: longer than either side needs to notice.
CUT_SECONDS = 8.0
LOST = "the connection with the ranks at"


class Cluster:
    """A head that is respawned, and a follower that is not."""

    def __init__(
        self, nodes: list[Node], model: pb.ModelOptions, words: list[str], stack: contextlib.ExitStack
    ) -> None:
        self._nodes = nodes
        self._model = model
        self._stack = stack
        self.worker = stack.enter_context(follower(nodes[1], *words))
        self.head = self._spawn()

    def load(self) -> None:
        result = in_background(self.head, self._model).result(PATIENCE)
        assert result.success, f"{result.message}\n{self.worker.stderr[-6000:]}"

    def respawn(self) -> None:
        """As the orchestrator does with a backend that is gone."""
        self.head = self._spawn()

    def _spawn(self) -> Backend:
        backend = self._stack.enter_context(head(self._nodes[0]))
        backend.wait_for_health(10)
        return backend

    def serves(self, ranks: tuple[int | None, ...] = (0, 1)) -> None:
        for rank in ranks:
            assert answers(self.head, rank) == expected()

    def cores(self) -> list[psutil.Process]:
        """The engine's processes at the follower."""
        return [process for process in self.worker.children() if "VLLM::" in name(process)]


class LongStream:
    """A stream on a rank, in a thread, from its first token on until something ends it.

    Attributes:
        code: the status it ended with.
        ended: `time.monotonic()` of that.

    """

    def __init__(self, backend: Backend, rank: int | None) -> None:
        self._request = predict_options(line("long"), **ENDLESS | {"Tokens": 3000})
        if rank is not None:
            self._request.Metadata["data_parallel_rank"] = str(rank)
        self._backend = backend
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.ended = 0.0
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._began.wait(30), self.details

    def _run(self) -> None:
        try:
            while True:  # one after the other, should the engine be quicker than the loss
                with self._backend.connection() as stub:
                    for _ in stub.PredictStream(self._request, timeout=60):
                        self._began.set()
        except grpc.RpcError as error:
            self.ended = time.monotonic()
            self.code, self.details = error.code(), str(error.details())

    def seconds_until_unavailable(self, since: float) -> float:
        self._thread.join(30)
        assert self.code is grpc.StatusCode.UNAVAILABLE, (self.code, self.details)
        return self.ended - since


@pytest.fixture
def data_parallel(nodes: list[Node], scripted: Path) -> Iterator[Cluster]:
    port = free_port()
    engine_args = {
        "data_parallel_size": 2,
        "data_parallel_size_local": 1,
        "data_parallel_address": nodes[0].address,
        "data_parallel_rpc_port": port,
    }
    places = f"--data-parallel-size 2 --data-parallel-size-local 1 --start-rank 1 --master-addr {nodes[0].address}"
    words = ["worker", str(scripted), *places.split(), "--master-port", str(port)]
    arguments = ["--", "--max-model-len", "4096", "--enforce-eager", "--dtype", "float32"]
    with contextlib.ExitStack() as stack:
        cluster = Cluster(nodes, _options(scripted, engine_args), [*words, *arguments], stack)
        started = time.monotonic()
        cluster.load()
        print(f"first load: {time.monotonic() - started:.1f} s")
        yield cluster


def _options(model: Path, engine_args: dict[str, object]) -> pb.ModelOptions:
    found = options(model, **engine_args)
    found.MaxModelLen = 4096
    return found


def recovers(cluster: Cluster, lose: Callable[[], None], *, rank: int | None = 1) -> None:
    """Streams end, the head does, and a new one serves with the same follower, all in time."""
    worker = cluster.worker.pid
    stream = LongStream(cluster.head, rank)
    lost = time.monotonic()
    lose()
    seconds = stream.seconds_until_unavailable(lost)
    assert cluster.head.wait_for_exit(15) == 1
    assert LOST in cluster.head.last_stderr_line
    assert LOST in stream.details
    ended = time.monotonic() - lost
    _serves_again(cluster, lost)
    print(f"stream ended after {seconds:.1f} s, head after {ended:.1f} s")
    assert seconds < STREAM_SECONDS
    assert psutil.Process(worker).is_running()


def _serves_again(cluster: Cluster, lost: float) -> None:
    cluster.respawn()
    cluster.load()
    cluster.serves((0, 1))
    seconds = time.monotonic() - lost
    print(f"served again {seconds:.1f} s after the loss")
    assert seconds < RECOVERY_SECONDS


def test_a_killed_rank(data_parallel: Cluster) -> None:
    before = set(data_parallel.cores())

    def lose() -> None:
        for process in before:
            process.kill()

    recovers(data_parallel, lose)
    assert before.isdisjoint(data_parallel.cores())


@heavy
def test_a_follower_that_is_cut_off(data_parallel: Cluster, nodes: list[Node]) -> None:
    def lose() -> None:
        nodes[1].cut()
        threading.Timer(CUT_SECONDS, nodes[1].mend).start()

    recovers(data_parallel, lose)


@heavy
def test_a_killed_head(data_parallel: Cluster) -> None:
    lost = time.monotonic()
    os.kill(data_parallel.head.pid, signal.SIGKILL)
    data_parallel.head.wait_for_exit(5)
    _serves_again(data_parallel, lost)


@heavy
def test_a_head_that_is_freed_and_loaded_again_at_once(data_parallel: Cluster) -> None:
    for _ in range(2):
        lost = time.monotonic()
        assert data_parallel.head.call("Free", pb.HealthMessage()).success
        data_parallel.load()
        data_parallel.serves()
        print(f"served again {time.monotonic() - lost:.1f} s after Free")


@heavy
def test_a_head_that_goes_while_it_loads(data_parallel: Cluster) -> None:
    """Ranks that have said HELLO to a head know an identity and a state that the next one does not."""
    assert data_parallel.head.call("Free", pb.HealthMessage()).success
    for delay in (1.0, 6.0, 12.0):
        load = in_background(data_parallel.head, data_parallel._model)
        time.sleep(delay)
        assert data_parallel.head.call("Free", pb.HealthMessage()).success
        assert not load.result(PATIENCE).success
    lost = time.monotonic()
    data_parallel.load()
    data_parallel.serves()
    assert time.monotonic() - lost < RECOVERY_SECONDS


@heavy
def test_a_killed_follower_leaves_nothing_and_may_be_started_again(
    data_parallel: Cluster, nodes: list[Node], scripted: Path
) -> None:
    """As a service manager does; the orchestrator is respawning the head meanwhile."""
    stream = LongStream(data_parallel.head, 1)
    lost = time.monotonic()
    os.kill(data_parallel.worker.pid, signal.SIGKILL)
    assert stream.seconds_until_unavailable(lost) < STREAM_SECONDS
    eventually(lambda: not nodes[1].pids(), 5, "nothing is left at the follower")
    assert data_parallel.head.wait_for_exit(15) != 0


@pytest.fixture
def tensor_parallel(nodes: list[Node], scripted: Path) -> Iterator[Cluster]:
    port = free_port()
    engine_args = {
        "tensor_parallel_size": 2,
        "nnodes": 2,
        "node_rank": 0,
        "master_addr": nodes[0].address,
        "master_port": port,
        "distributed_executor_backend": "mp",
    }
    words = ["worker", str(scripted), "--master-addr", nodes[0].address, "--master-port", str(port), "--"]
    words += [
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--tensor-parallel-size",
        "2",
        "--distributed-executor-backend",
        "mp",
    ]
    words += ["--max-model-len", "4096", "--enforce-eager", "--dtype", "float32"]
    with contextlib.ExitStack() as stack:
        cluster = Cluster(nodes, _options(scripted, engine_args), words, stack)
        cluster.load()
        yield cluster


@heavy
@pytest.mark.parametrize("how", ["killed", "cut"])
def test_a_node_of_tensor_parallelism(tensor_parallel: Cluster, nodes: list[Node], how: str) -> None:
    cluster = tensor_parallel

    def lose() -> None:
        if how == "killed":
            for process in cluster.cores():
                process.kill()
        else:
            nodes[1].cut()
            threading.Timer(CUT_SECONDS, nodes[1].mend).start()

    stream = LongStream(cluster.head, None)
    lost = time.monotonic()
    lose()
    seconds = stream.seconds_until_unavailable(lost)
    assert cluster.head.wait_for_exit(15) != 0
    cluster.respawn()
    cluster.load()
    cluster.serves((None,))
    print(f"stream ended after {seconds:.1f} s, served again {time.monotonic() - lost:.1f} s after the loss")
    assert seconds < STREAM_SECONDS
    assert time.monotonic() - lost < RECOVERY_SECONDS
