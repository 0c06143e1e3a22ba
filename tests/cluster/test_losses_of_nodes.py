"""Nodes that are lost under tensor parallelism, whose workers wait for each other in every step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import heavy, needs_namespaces
from tests.cluster.losses import SHARED, Cluster, cut, recovers, serving, topology
from tests.cluster.network import Node
from tests.process.orchestrator import eventually, free_port

pytestmark = [needs_namespaces, heavy, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(nodes: list[Node], scripted: Path) -> Iterator[Cluster]:
    port = free_port()
    places = {"nnodes": 2, "master_addr": nodes[0].address, "master_port": port, "distributed_executor_backend": "mp"}
    model = topology(scripted, tensor_parallel_size=2, **places)
    words = ["worker", str(scripted), "--master-addr", nodes[0].address, "--master-port", str(port)]
    words += ["--", "--nnodes", "2", "--node-rank", "1", "--tensor-parallel-size", "2"]
    words += ["--distributed-executor-backend", "mp", *SHARED]
    with serving(nodes, model, words, ranks=(None,)) as cluster:
        yield cluster


def test_killed_workers(cluster: Cluster) -> None:
    def lose() -> None:
        for process in cluster.cores():
            process.kill()

    recovers(cluster, lose, None, what="killed workers of a node")


def test_a_node_that_is_cut_off(cluster: Cluster, nodes: list[Node]) -> None:
    recovers(cluster, lambda: cut(nodes[1]), None, what="a node that is cut off")


def test_a_loss_that_no_request_notices(cluster: Cluster) -> None:
    for process in cluster.cores():
        process.kill()
    eventually(lambda: cluster.head.exit_status is not None, 15, "the head ends")
    assert cluster.head.exit_status == 1
