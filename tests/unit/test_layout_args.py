"""The arguments of a layout, as vLLM's own parsers and configurations take them."""

import json
from typing import Any

import pytest
from vllm import AsyncEngineArgs
from vllm.config import CacheConfig, VllmConfig
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from common.engine_args import plan_load
from common.engine_fields import FIELDS, engine_args_json
from common.layout_args import Follower, Target, engine_args, followers, ray_lines
from common.layouts import Cluster, Layout
from common.pb import backend_pb2 as pb
from tests.models import ensure

HEAD = "10.0.0.1"
EXTRA = {"max_model_len": 1024, "gpu_memory_utilization": 0.9, "kv_cache_dtype": "fp8", "trust_remote_code": True}
LAYOUTS = {
    "one machine": Layout(2),
    "copies on one machine": Layout(2, 1, 4, 4),
    "copies on two machines": Layout(1, 1, 2, 1),
    "split copies on three": Layout(2, 1, 12, 4),
    "experts": Layout(2, 1, 8, 4, experts=True),
    "a pipeline over two": Layout(1, 2, nodes=2),
    "both over three": Layout(2, 3, nodes=3),
    "tensors over two": Layout(2, nodes=2),
}
# What a follower must have from its head.
SHARED = (
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_address"),
    *("data_parallel_rpc_port", "enable_expert_parallel", "nnodes", "master_addr", "master_port"),
    *("distributed_executor_backend", "data_parallel_backend", *EXTRA),
)


def parsed(words: tuple[str, ...]) -> Any:
    """A line of `run.sh serve`, by vLLM's own parser."""
    assert words[:2] == ("run.sh", "serve")
    flags = make_arg_parser(FlexibleArgumentParser()).parse_args(list(words[2:]))
    validate_parsed_serve_args(flags)
    flags.model = flags.model_tag
    return flags


@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["bare", "extra"])
@pytest.mark.parametrize("ray", [False, True], ids=["mp", "ray"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_load_model_takes_the_head_s_arguments(layout: Layout, extra: dict[str, Any], ray: bool) -> None:
    found = engine_args(layout, Target("org/model", HEAD, None, extra), ray=ray)
    assert found.keys() <= FIELDS.keys()
    text = pb.ModelOptions(Model="org/model", EngineArgs=json.dumps(found))
    assert engine_args_json(text.EngineArgs) == found
    made = AsyncEngineArgs(model="org/model", **found)
    assert (made.tensor_parallel_size, made.pipeline_parallel_size) == (layout.tensor, layout.pipeline)
    assert made.data_parallel_size == layout.data
    if ray:
        assert "ray" in (made.data_parallel_backend, made.distributed_executor_backend)
        assert made.nnodes == 1
    else:
        assert plan_load(text).engine_args.items() >= found.items()


@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["bare", "extra"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_followers_agree_with_their_head(layout: Layout, extra: dict[str, Any]) -> None:
    target = Target("org/model", HEAD, None, extra)
    head = AsyncEngineArgs(model="org/model", **engine_args(layout, target))
    found = followers(layout, target)
    assert [each.node for each in found] == list(range(1, layout.machines))
    ranks = set(range(layout.local))
    for each in found:
        flags = parsed(each.serve)
        assert flags.headless
        args = AsyncEngineArgs.from_cli_args(flags)
        assert {name: getattr(args, name) for name in SHARED} == {name: getattr(head, name) for name in SHARED}
        if layout.nodes > 1:
            assert args.node_rank == each.node
        else:
            assert args.data_parallel_size_local == layout.local
            ranks |= {args.data_parallel_start_rank + index for index in range(layout.local)}
    assert layout.nodes > 1 or ranks == set(range(layout.data))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_worker_hands_on_what_the_serve_line_has(layout: Layout) -> None:
    """The flags of the orchestrator's own worker become vLLM's; what it does not know goes through untouched."""
    names = {
        "--start-rank": "--data-parallel-start-rank",
        "--master-addr": "--data-parallel-address",
        "--master-port": "--data-parallel-rpc-port",
    }
    for each in followers(layout, Target("org/model", HEAD, 29999, EXTRA)):
        own, passed = worker_words(each)
        if layout.nodes == 1:
            assert own["--start-rank"] == str(each.node * layout.local)
            renamed = [word for name, value in own.items() for word in (names.get(name, name), value)]
            assert ("run.sh", "serve", "org/model", "--headless", *renamed, *passed) == each.serve
        else:
            assert own == {"--master-addr": HEAD, "--master-port": "29999"}
            where = ("--master-addr", HEAD, "--master-port", "29999")
            assert ("run.sh", "serve", "org/model", "--headless", *where, *passed) == each.serve


def worker_words(follower: Follower) -> tuple[dict[str, str], list[str]]:
    """The worker's own flags, and the words for vLLM."""
    start, command, model, *words = follower.worker
    assert (start, command, model) == ("run.sh", "worker", "org/model")
    passed = [word.removeprefix("--vllm-arg=") for word in words if word.startswith("--vllm-arg=")]
    own = words[: len(words) - len(passed)]
    return dict(zip(own[::2], own[1::2], strict=True)), passed


def configured(args: AsyncEngineArgs, *, headless: bool) -> VllmConfig:
    return args.create_engine_config(headless=headless)


@pytest.mark.parametrize(
    ("layout", "spans"),
    [(Layout(1, 1, 2, 1), 1), (Layout(2, 1, 6, 2), 1), (Layout(2, nodes=2), 2), (Layout(1, 2, nodes=2), 2)],
    ids=["copies", "split copies", "tensors over two", "a pipeline over two"],
)
def test_vllm_makes_one_topology_of_all_machines(layout: Layout, spans: int) -> None:
    target = Target(str(ensure("scripted")), HEAD, None, {"max_model_len": 512, "enforce_eager": True})
    head = configured(AsyncEngineArgs(model=target.model, **engine_args(layout, target)), headless=False)
    nodes = [configured(AsyncEngineArgs.from_cli_args(parsed(each.serve)), headless=True) for each in
             followers(layout, target)]  # fmt: skip
    assert head.parallel_config.nnodes_within_dp == spans
    for index, node in enumerate(nodes, start=1):
        ours, theirs = head.parallel_config, node.parallel_config
        assert theirs.data_parallel_rank == index * layout.local * (spans == 1)
        assert theirs.node_rank_within_dp == (index if spans > 1 else 0)
        assert theirs.local_world_size == layout.tensor * layout.pipeline // spans
        assert (theirs.master_addr, theirs.master_port) == (ours.master_addr, ours.master_port)
        if spans == 1:
            assert theirs.data_parallel_master_ip == ours.data_parallel_master_ip == HEAD
        assert theirs.data_parallel_rpc_port == ours.data_parallel_rpc_port
        # Ranks of one cluster compare this before they serve.
        assert theirs.compute_hash() == ours.compute_hash()


def test_a_port_of_one_s_own() -> None:
    target = Target("org/model", HEAD, 31000)
    assert engine_args(Layout(1, 1, 2, 1), target)["data_parallel_rpc_port"] == 31000
    assert engine_args(Layout(2, nodes=2), target)["master_port"] == 31000
    for layout in (Layout(1, 1, 2, 1), Layout(2, nodes=2)):
        (follower,) = followers(layout, target)
        assert "31000" in follower.serve
        assert "31000" in follower.worker


def test_the_defaults_are_vllm_s() -> None:
    found = VllmConfig().parallel_config
    target = Target("org/model", HEAD)
    assert engine_args(Layout(2, nodes=2), target)["master_port"] == found.master_port
    assert engine_args(Layout(1, 1, 2, 1), target)["data_parallel_rpc_port"] == found.data_parallel_rpc_port
    assert CacheConfig().gpu_memory_utilization == Cluster(1, 1, 1).utilization


def test_a_ray_cluster_has_a_line_for_each_machine() -> None:
    lines = ray_lines(Layout(8, 2, nodes=2), Target("org/model", HEAD))
    assert len(lines) == 2
    assert f"--node-ip-address={HEAD}" in lines[0]
    assert f"--address={HEAD}:6379" in lines[1]
