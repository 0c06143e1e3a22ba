"""Nodes, and servers and followers in them: one engine of each at a time, for they share the machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.network import Network, Node, available
from tests.models import ensure
from tests.process.orchestrator import RUN_SH, Backend, free_port

# Two engines share the cores.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

needs_namespaces = pytest.mark.skipif(not available(), reason="network namespaces need root and iproute2")
heavy = pytest.mark.skipif(not os.environ.get("CLUSTER"), reason="make test-cluster")


def head(node: Node, *flags: str, host: str = "", env: dict[str, str] | None = None) -> Backend:
    """A server in `node`, which the tests reach at its address; a context manager."""
    addr = f"{host or node.address}:{free_port()}"
    program, *argv = node.argv(RUN_SH, "--addr", addr, *flags)
    return Backend(run_sh=program, argv=argv, addr=addr, cwd=RUN_SH.parent, env=ENVIRONMENT | (env or {}))


def follower(node: Node, *words: str, run_sh: Path = RUN_SH, env: dict[str, str] | None = None) -> Backend:
    """run.sh with these words in `node`; a context manager that ends it, and knows its processes and its output."""
    program, *argv = node.argv(run_sh, *words)
    return Backend(run_sh=program, argv=argv, addr="", cwd=RUN_SH.parent, env=ENVIRONMENT | (env or {}))


@pytest.fixture(scope="session")
def scripted() -> Path:
    """The folder of the scripted model."""
    return ensure("scripted")


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Node]]:
    """Three machines."""
    with Network(3) as network:
        yield network.nodes
