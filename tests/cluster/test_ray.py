"""`make test-cluster`: Ray as far as a CPU goes. The arguments reach vLLM, whose refusal is LoadModel's message."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import ray
from tests.cluster.conftest import head, heavy, needs_namespaces
from tests.cluster.lines import answers, expected, options
from tests.cluster.network import Network, Node
from tests.process.orchestrator import Backend

pytestmark = [needs_namespaces, heavy, pytest.mark.timeout(600)]

REFUSAL = "current platform cpu does not support ray"


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    with Network(2) as network:
        yield network.nodes


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """What Ray keeps; sockets are in it, whose names must be short."""
    folder = Path("/tmp") / f"ray-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address(nodes: list[Node], folder: Path) -> Iterator[str]:
    with ray.cluster(nodes, folder) as address:
        assert ray.nodes_alive(address, nodes[0]) == len(nodes)
        yield address


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    ours = os.pathsep.join(filter(None, (ray.python_path(), os.environ.get("PYTHONPATH"))))
    return {**ray.QUIET, "PYTHONPATH": ours}


@pytest.fixture(scope="module")
def backend(nodes: list[Node], address: str, environment: dict[str, str]) -> Iterator[Backend]:
    with head(nodes[0], env=environment | {"RAY_ADDRESS": address}) as backend:
        backend.wait_for_health()
        yield backend


def test_vllms_refusal_comes_back(backend: Backend, scripted: Path) -> None:
    result = backend.load(options(scripted, tensor_parallel_size=2, distributed_executor_backend="ray"))
    assert not result.success
    assert REFUSAL in result.message
    assert not backend.left()


def test_data_parallel_ranks_are_placed_by_devices(backend: Backend, scripted: Path, nodes: list[Node]) -> None:
    """The server itself is Ray's client then, and must not stay so."""
    topology = {"data_parallel_size": 2, "data_parallel_backend": "ray", "data_parallel_address": nodes[0].address}
    result = backend.load(options(scripted, **topology))
    assert not result.success
    # The kind of device that a CPU is for Ray has no name in vLLM.
    assert result.message == "AssertionError: No found in Ray cluster."
    assert not backend.left()


def test_the_cluster_and_the_server_are_none_the_worse(
    backend: Backend, scripted: Path, nodes: list[Node], address: str
) -> None:
    assert ray.nodes_alive(address, nodes[0]) == len(nodes)
    assert backend.load(options(scripted)).success
    assert answers(backend) == expected()
    # Ray has left the signals to the server.
    stop = backend.stop()
    assert stop.status == 0
    assert not stop.killed


@pytest.mark.parametrize(
    "topology",
    [
        {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
        {"data_parallel_size": 2, "data_parallel_backend": "ray"},
    ],
    ids=" ".join,
)
def test_a_cluster_that_a_load_has_started_ends_with_it(
    nodes: list[Node], scripted: Path, folder: Path, environment: dict[str, str], topology: dict[str, object]
) -> None:
    with head(nodes[1], env=environment | {"RAY_TMPDIR": str(folder)}) as backend:
        backend.wait_for_health()
        result = backend.load(options(scripted, **topology))
        # Each has a reason of its own.
        assert not result.success
        assert "Started a local Ray instance" in backend.stderr
        assert not backend.left()
