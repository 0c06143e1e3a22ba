"""Machines that are lost under data parallelism: what becomes of streams and of the head, and that it serves again.

Nobody touches the follower: `run.sh worker` sees to it. The tests are the orchestrator, which spawns a head again at
the same place and loads again. Each leaves the cluster as it has found it, serving.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.pb import backend_pb2 as pb
from tests.cluster.conftest import heavy, needs_namespaces
from tests.cluster.lines import PATIENCE, in_background
from tests.cluster.losses import (
    LOST,
    RECOVERY_SECONDS,
    SHARED,
    STREAM_SECONDS,
    Cluster,
    LongStream,
    cut,
    recovers,
    serves_again,
    serving,
    topology,
)
from tests.cluster.network import Node
from tests.process.orchestrator import eventually, free_port

pytestmark = [needs_namespaces, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(nodes: list[Node], scripted: Path) -> Iterator[Cluster]:
    port = free_port()
    places = {"data_parallel_address": nodes[0].address, "data_parallel_rpc_port": port}
    model = topology(scripted, data_parallel_size=2, data_parallel_size_local=1, **places)
    words = ["worker", str(scripted), "--data-parallel-size=2", "--data-parallel-size-local=1", "--start-rank=1"]
    words += [f"--master-addr={nodes[0].address}", f"--master-port={port}", "--", *SHARED]
    with serving(nodes, model, words, ranks=(0, 1)) as cluster:
        yield cluster


def test_a_killed_rank(cluster: Cluster) -> None:
    before = set(cluster.cores())
    assert before

    def lose() -> None:
        for process in before:
            process.kill()

    former = cluster.head
    recovers(cluster, lose, 1, what="a killed rank")
    assert LOST in former.last_stderr_line
    assert before.isdisjoint(cluster.cores())


@heavy
def test_a_stream_on_a_rank_that_stands(cluster: Cluster) -> None:
    """It ends too, for vLLM can't do without a rank."""

    def lose() -> None:
        for process in cluster.cores():
            process.kill()

    recovers(cluster, lose, 0, what="a killed rank, streams on another")


@heavy
def test_a_follower_that_is_cut_off(cluster: Cluster, nodes: list[Node]) -> None:
    former = cluster.head
    recovers(cluster, lambda: cut(nodes[1]), 1, what="a follower that is cut off")
    assert LOST in former.last_stderr_line


@heavy
def test_a_head_that_is_freed_and_loaded_again_at_once(cluster: Cluster) -> None:
    for _ in range(2):
        lost = time.monotonic()
        assert cluster.head.call("Free", pb.HealthMessage()).success
        cluster.load()
        cluster.serves()
        print(f"a freed head: served again after {time.monotonic() - lost:.1f} s")
        assert time.monotonic() - lost < RECOVERY_SECONDS


@heavy
def test_a_head_that_goes_while_it_loads(cluster: Cluster) -> None:
    """Ranks that have said HELLO to a head know an identity and a state that the next one does not."""
    assert cluster.head.call("Free", pb.HealthMessage()).success
    for delay in (2.0, 10.0):
        load = in_background(cluster.head, cluster.model)
        time.sleep(delay)
        assert cluster.head.call("Free", pb.HealthMessage()).success
        assert not load.result(PATIENCE).success
    lost = time.monotonic()
    cluster.load()
    cluster.serves()
    print(f"a load that was given up: served again after {time.monotonic() - lost:.1f} s")
    assert time.monotonic() - lost < RECOVERY_SECONDS


@heavy
def test_a_killed_head(cluster: Cluster) -> None:
    lost = time.monotonic()
    os.kill(cluster.head.pid, signal.SIGKILL)
    cluster.head.wait_for_exit(5)
    serves_again(cluster, lost, what="a killed head")


@heavy
def test_a_killed_follower_leaves_nothing(cluster: Cluster) -> None:
    """What starts it again is a service manager's business; the last of these tests, for here there is none."""
    stream = LongStream(cluster.head, 1)
    assert cluster.worker.processes()
    lost = time.monotonic()
    os.kill(cluster.worker.pid, signal.SIGKILL)
    seconds = stream.seconds_until_unavailable(lost)
    assert cluster.head.wait_for_exit(15) == 1
    print(f"a killed worker: stream ended after {seconds:.1f} s")
    assert seconds < STREAM_SECONDS
    eventually(lambda: not cluster.worker.processes(), 5, "nothing is left at the follower")
