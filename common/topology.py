"""Where the ranks of an engine run, and the command lines that start those of other machines.

Ranks are vLLM's: data-parallel ones are engines of their own, which say HELLO to the head on `data_parallel_rpc_port`;
those of tensor and pipeline parallelism over several nodes are workers, which meet at `master_addr:master_port`.
"""

import dataclasses
import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from common.errors import InvalidRequest

# Engine arguments that say which ranks run where; a line has its own.
PLACES = frozenset(
    {
        "data_parallel_address",
        "data_parallel_rank",
        "data_parallel_rpc_port",
        "data_parallel_size",
        "data_parallel_size_local",
        "data_parallel_start_rank",
        "master_addr",
        "master_port",
        "nnodes",
        "node_rank",
    }
)
# What only a frontend reads, and what a line on a screen should not show.
_FRONTEND = frozenset(
    {
        "allowed_local_media_path",
        "allowed_media_domains",
        "disable_log_stats",
        "enable_log_requests",
        "hf_token",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "model",
        "otlp_traces_endpoint",
        "served_model_name",
    }
)
# Lists that vLLM's command line reads as one word, with commas.
_ONE_WORD = frozenset({"device_ids"})


class Parallel(Protocol):
    """What is read of vLLM's `ParallelConfig`."""

    data_parallel_size: int
    data_parallel_size_local: int
    data_parallel_backend: str
    data_parallel_master_ip: str
    data_parallel_rpc_port: int
    distributed_executor_backend: Any
    enable_expert_parallel: bool
    master_addr: str
    master_port: int
    nnodes: int
    world_size: int

    @property
    def local_engines_only(self) -> bool:
        """Whether each node's frontend has its own engines alone."""

    @property
    def nnodes_within_dp(self) -> int:
        """Nodes that one data-parallel rank spans."""


@dataclasses.dataclass(frozen=True)
class Missing:
    """Ranks that the head waits for, and how they are started."""

    ranks: str
    line: str

    def __str__(self) -> str:
        return f"{self.ranks}: {self.line}"


def check_head(args: Mapping[str, Any]) -> None:
    """Refuse what a head can't be told.

    Raises:
        InvalidRequest: a place that is a follower's, or a launcher that is none for servers.

    """
    if args.get("distributed_executor_backend") == "external_launcher":
        # ExecutorWithExternalLauncher: one scheduler per rank, in step only while all are given the same.
        raise InvalidRequest(
            "distributed_executor_backend",
            "external_launcher (torchrun) gives each rank a scheduler of its own, which stay in step only while one"
            " program gives all of them the same requests in the same order; clients of a server don't. Use mp with"
            " nnodes, or ray",
        )
    if rank := args.get("node_rank"):
        raise InvalidRequest(
            "node_rank", f"{rank} is a follower's, and a head has 0; start it with run.sh serve MODEL --headless"
        )


def check_experts(parallel: Parallel) -> None:
    """Refuse what a mixture of experts can't do on CPUs: its engines would die of the first request.

    Raises:
        InvalidRequest: it has data-parallel ranks, whose communicator lacks `all_gatherv`, or spreads whole experts,
            which the kernels don't take.

    """
    for field, asked in (
        ("data_parallel_size", parallel.data_parallel_size > 1),
        ("enable_expert_parallel", parallel.enable_expert_parallel and parallel.world_size > 1),
    ):
        if asked:
            raise InvalidRequest(
                field, "vLLM 0.32 spreads a mixture of experts on CPUs by tensor_parallel_size alone; leave it out"
            )


def head_address(parallel: Parallel) -> str:
    """The address that other machines are told; empty where there are none, or where Ray finds them."""
    if _remote_ranks(parallel) or parallel.local_engines_only:
        return parallel.data_parallel_master_ip
    return parallel.master_addr if parallel.nnodes > 1 else ""


def has_followers(parallel: Parallel) -> bool:
    """Whether `run.sh serve` on other machines makes this engine whole."""
    return waits_for_ranks(parallel) or parallel.nnodes > 1


def waits_for_ranks(parallel: Parallel) -> bool:
    """Whether data-parallel ranks of other machines say HELLO to this head."""
    return bool(_remote_ranks(parallel))


def _remote_ranks(parallel: Parallel) -> range:
    """The data-parallel ranks that other machines start."""
    if parallel.data_parallel_backend != "mp" or parallel.local_engines_only:
        return range(0)
    return range(parallel.data_parallel_size_local, parallel.data_parallel_size)


def remote_workers(parallel: Parallel) -> int:
    """The workers of other nodes that meet those of our own rank at `master_port`."""
    return parallel.world_size - parallel.world_size // parallel.nnodes_within_dp


def missing(parallel: Parallel, arrived: Collection[int], workers: int, args: Mapping[str, Any]) -> list[Missing]:
    """What is to be started elsewhere.

    One line per node where there are nodes. Without, one for as many ranks as the head has itself: how many a machine
    has room for is not known here.

    Args:
        parallel: the head's.
        arrived: data-parallel ranks that have said HELLO.
        workers: those of other nodes that have come to `master_port`.
        args: the head's engine arguments, as it was told.

    """
    absent = [rank for rank in _remote_ranks(parallel) if rank not in arrived]
    if parallel.nnodes > 1:
        span = parallel.nnodes_within_dp
        nodes = set(range(1, span)) if workers < remote_workers(parallel) else set()
        for rank in absent:
            nodes |= set(range(rank * span, (rank + 1) * span)) if span > 1 else {_node_of(rank, parallel)}
        return [Missing(f"node {node}", serve_line(args, _node(args, node))) for node in sorted(nodes)]
    return [
        Missing(_named(group), serve_line(args, _ranks(args, parallel, group)))
        for group in _groups(absent, max(parallel.data_parallel_size_local, 1))
    ]


def serve_line(args: Mapping[str, Any], places: Mapping[str, Any]) -> str:
    """`run.sh serve` with the engine arguments of a head, at other `places`."""
    shared = {name: value for name, value in args.items() if name not in PLACES | _FRONTEND}
    words = ["run.sh", "serve", str(args["model"]), "--headless", *flags(places), *flags(shared)]
    return shlex.join(words)


def flags(args: Mapping[str, Any]) -> Iterator[str]:
    """Engine arguments as words of vLLM's command line."""
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value == "":
            continue
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif isinstance(value, dict):
            yield from (flag, json.dumps(value))
        elif isinstance(value, list | tuple | set | frozenset):
            words = map(str, value)
            yield from (flag, ",".join(words)) if name in _ONE_WORD else (flag, *words)
        else:
            yield from (flag, str(value))


def _node_of(rank: int, parallel: Parallel) -> int:
    return rank // max(parallel.data_parallel_size_local, 1)


def _node(args: Mapping[str, Any], node: int) -> dict[str, Any]:
    kept = {name: args[name] for name in sorted(PLACES & args.keys()) if name not in ("node_rank", "nnodes")}
    return {"nnodes": args["nnodes"], "node_rank": node} | kept


def _ranks(args: Mapping[str, Any], parallel: Parallel, group: Sequence[int]) -> dict[str, Any]:
    return {
        "data_parallel_size": parallel.data_parallel_size,
        "data_parallel_size_local": len(group),
        "data_parallel_start_rank": group[0],
        "data_parallel_address": args.get("data_parallel_address") or parallel.data_parallel_master_ip,
        "data_parallel_rpc_port": parallel.data_parallel_rpc_port,
    }


def _groups(ranks: Iterable[int], most: int) -> list[list[int]]:
    """Neighbours together, at most so many."""
    groups: list[list[int]] = []
    for rank in ranks:
        if groups and groups[-1][-1] == rank - 1 and len(groups[-1]) < most:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _named(group: Sequence[int]) -> str:
    if len(group) == 1:
        return f"data-parallel rank {group[0]}"
    return f"data-parallel ranks {group[0]} to {group[-1]}"
