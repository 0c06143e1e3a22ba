"""A cluster that loses machines: its head is respawned, as by the orchestrator, and its follower is not touched."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil

from common.pb import backend_pb2 as pb
from tests.cluster.conftest import follower, head
from tests.cluster.lines import PATIENCE, answers, expected, in_background, options
from tests.cluster.network import Node
from tests.models.script import line
from tests.process.orchestrator import Backend, name
from tests.process.wire import ENDLESS, predict_options

# What is promised.
STREAM_SECONDS = 5.0
# Not a promise: nearly all of it is the start of an engine and a rank, which took 20 to 80 on machines of two cores.
RECOVERY_SECONDS = 150.0
# How long a cable is out: longer than either side needs to notice.
CUT_SECONDS = 8.0
LOST = "the connection with the ranks at"
CONTEXT = 4096
# What the followers must share with the head.
SHARED = ("--max-model-len", str(CONTEXT), "--enforce-eager", "--dtype", "float32")


class Cluster:
    """A head that is respawned, and a follower that is not."""

    def __init__(
        self,
        nodes: list[Node],
        model: pb.ModelOptions,
        words: list[str],
        stack: contextlib.ExitStack,
        *,
        ranks: tuple[int | None, ...],
    ) -> None:
        self._nodes = nodes
        self.model = model
        self._ranks = ranks
        self._stack = stack
        self.worker = stack.enter_context(follower(nodes[1], *words))
        # pytest shows it with a failure.
        stack.callback(lambda: print(f"--- stderr of the worker ---\n{self.worker.stderr[-12000:]}"))
        self.head = self._spawn()

    def load(self) -> None:
        result = in_background(self.head, self.model).result(PATIENCE)
        assert result.success, f"{result.message}\n{self.worker.stderr[-6000:]}"

    def respawn(self) -> None:
        """As the orchestrator does with a backend that is gone."""
        self.head = self._spawn()

    def _spawn(self) -> Backend:
        backend = self._stack.enter_context(head(self._nodes[0]))
        self._stack.callback(lambda: print(f"--- stderr of a head ---\n{backend.stderr[-6000:]}"))
        backend.wait_for_health(10)
        return backend

    def serves(self) -> None:
        for rank in self._ranks:
            assert answers(self.head, rank) == expected()

    def cores(self) -> list[psutil.Process]:
        """The engine's processes at the follower."""
        return [process for process in self.worker.children() if "VLLM::" in name(process)]


@contextlib.contextmanager
def serving(
    nodes: list[Node], model: pb.ModelOptions, words: list[str], *, ranks: tuple[int | None, ...]
) -> Iterator[Cluster]:
    """A cluster that has loaded `model` and serves."""
    with contextlib.ExitStack() as stack:
        cluster = Cluster(nodes, model, words, stack, ranks=ranks)
        started = time.monotonic()
        cluster.load()
        cluster.serves()
        print(f"first load: {time.monotonic() - started:.1f} s")
        yield cluster


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


def topology(model: Path, **engine_args: object) -> pb.ModelOptions:
    """LoadModel's request."""
    found = options(model, dtype="float32", **engine_args)
    found.MaxModelLen = CONTEXT
    return found


def cut(node: Node) -> None:
    """Pull its cable, and put it back later."""
    node.cut()
    threading.Timer(CUT_SECONDS, node.mend).start()


def recovers(cluster: Cluster, lose: Callable[[], None], rank: int | None, *, what: str) -> None:
    """Streams end, the head does, and a new one serves with the same follower, all in time."""
    former = cluster.head
    stream = LongStream(former, rank)
    lost = time.monotonic()
    lose()
    seconds = stream.seconds_until_unavailable(lost)
    assert former.wait_for_exit(15) == 1
    ended = time.monotonic() - lost
    serves_again(cluster, lost, what=f"{what}: stream ended after {seconds:.1f} s, head after {ended:.1f} s")
    assert seconds < STREAM_SECONDS
    assert "the engine died" in former.last_stderr_line
    assert "the engine died" in stream.details


def serves_again(cluster: Cluster, lost: float, *, what: str) -> None:
    """Respawned and loaded again, it answers in time, and nobody has touched the follower."""
    cluster.respawn()
    cluster.load()
    cluster.serves()
    seconds = time.monotonic() - lost
    print(f"{what}; served again after {seconds:.1f} s")
    assert seconds < RECOVERY_SECONDS
    assert cluster.worker.exit_status is None
