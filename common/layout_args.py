"""A layout as vLLM takes it: the EngineArgs of the head's LoadModel, and the command lines of the other machines."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from common.layouts import Layout
from common.topology import flags

# vLLM's defaults, of ParallelConfig.
RPC_PORT, MASTER_PORT = 29550, 29501
RAY_PORT = 6379


@dataclasses.dataclass(frozen=True)
class Target:
    """What the machines have to agree on, beside the layout."""

    model: str
    """A folder, the same on each, or a hub id."""
    head: str
    """The head's address, as the others reach it."""
    port: int | None = None
    """Where they find it; None for vLLM's default."""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other engine arguments."""


@dataclasses.dataclass(frozen=True)
class Follower:
    """What runs on a machine beside the head's. Words of a command line each."""

    node: int
    worker: tuple[str, ...]
    """`run.sh worker ...`: supervised, and registered if it is told with whom."""
    serve: tuple[str, ...]
    """`run.sh serve ...`: vLLM's own command line, the same ranks."""


def engine_args(layout: Layout, target: Target, *, ray: bool = False) -> dict[str, Any]:
    """EngineArgs of the head's LoadModel."""
    args: dict[str, Any] = _split(layout)
    sizes = {"data_parallel_size": layout.data, "data_parallel_size_local": layout.local}
    if ray and layout.data > 1:
        args |= {**sizes, "data_parallel_backend": "ray", "data_parallel_address": target.head}
    elif ray:
        args["distributed_executor_backend"] = "ray"
    elif layout.nodes > 1:
        args |= {"distributed_executor_backend": "mp", "nnodes": layout.nodes, "node_rank": 0}
        args |= {"master_addr": target.head, "master_port": target.port or MASTER_PORT}
    elif layout.machines > 1:
        args |= {**sizes, "data_parallel_address": target.head, "data_parallel_rpc_port": target.port or RPC_PORT}
    elif layout.data > 1:
        args |= sizes
    return {**args, **target.extra}


def followers(layout: Layout, target: Target) -> list[Follower]:
    """The machines beside the head's, in the order of their ranks."""
    make = _spanning if layout.nodes > 1 else _replicas
    return [make(layout, target, node) for node in range(1, layout.machines)]


def ray_lines(layout: Layout, target: Target) -> list[tuple[str, ...]]:
    """The command lines that make one Ray cluster of the machines, the head's first; LoadModel comes after."""
    first = ("ray", "start", "--head", f"--node-ip-address={target.head}", f"--port={RAY_PORT}")
    other = ("ray", "start", f"--address={target.head}:{RAY_PORT}", "--block")
    return [first, *[other] * (layout.machines - 1)]


def _split(layout: Layout) -> dict[str, Any]:
    """What is the same on all machines."""
    args: dict[str, Any] = {}
    if layout.tensor > 1:
        args["tensor_parallel_size"] = layout.tensor
    if layout.pipeline > 1:
        args["pipeline_parallel_size"] = layout.pipeline
    if layout.experts:
        args["enable_expert_parallel"] = True
    return args


def _replicas(layout: Layout, target: Target, node: int) -> Follower:
    rank, port = str(node * layout.local), str(target.port or RPC_PORT)
    sizes = ["--data-parallel-size", str(layout.data), "--data-parallel-size-local", str(layout.local)]
    same = [*flags(_split(layout)), *flags(target.extra)]
    worker = [*sizes, "--start-rank", rank, "--master-addr", target.head, "--master-port", port, *_passed(same)]
    serve = [*sizes, "--data-parallel-start-rank", rank, "--data-parallel-address", target.head]
    return _lines(target, node, worker, [*serve, "--data-parallel-rpc-port", port, *same])


def _spanning(layout: Layout, target: Target, node: int) -> Follower:
    where = ["--master-addr", target.head, "--master-port", str(target.port or MASTER_PORT)]
    rank = ["--nnodes", str(layout.nodes), "--node-rank", str(node), "--distributed-executor-backend", "mp"]
    same = [*rank, *flags(_split(layout)), *flags(target.extra)]
    return _lines(target, node, [*where, *_passed(same)], [*where, *same])


def _lines(target: Target, node: int, worker: list[str], serve: list[str]) -> Follower:
    return Follower(
        node,
        worker=("run.sh", "worker", target.model, *worker),
        serve=("run.sh", "serve", target.model, "--headless", *serve),
    )


def _passed(words: list[str]) -> list[str]:
    """Words for vLLM, as the worker hands them on."""
    return [f"--vllm-arg={word}" for word in words]
