"""Which ranks are missing, and the lines that start them: vLLM's own command line reads them back as they were."""

import dataclasses
import shlex
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm import AsyncEngineArgs
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from common.engine_args import LoadPlan, plan_load
from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.topology import (
    Missing,
    Parallel,
    check_experts,
    check_head,
    flags,
    has_followers,
    head_address,
    missing,
    remote_workers,
    waits_for_ranks,
)

ARGS = {"model": "org/model"}


def parallel(**fields: Any) -> Parallel:
    """What vLLM makes of engine arguments, as far as it is read here."""
    given: dict[str, Any] = {
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "data_parallel_backend": "mp",
        "data_parallel_master_ip": "10.0.0.1",
        "data_parallel_rpc_port": 29550,
        "distributed_executor_backend": "mp",
        "enable_expert_parallel": False,
        "local_engines_only": False,
        "master_addr": "10.0.0.1",
        "master_port": 29501,
        "nnodes": 1,
        "nnodes_within_dp": 1,
        "world_size": 1,
    }
    return cast("Parallel", SimpleNamespace(**given | fields))


def words(missed: list[Missing]) -> list[tuple[str, dict[str, str]]]:
    """Who is missing, and the flags of their line with their values."""
    found = []
    for each in missed:
        program, serve, model, headless, *rest = shlex.split(each.line)
        assert (program, serve, model, headless) == ("run.sh", "serve", "org/model", "--headless")
        found.append((each.ranks, dict(zip(rest[::2], rest[1::2], strict=True))))
    return found


def ranks_of(missed: list[Missing]) -> list[tuple[str, str, str]]:
    return [
        (name, line["--data-parallel-start-rank"], line["--data-parallel-size-local"]) for name, line in words(missed)
    ]


@pytest.mark.parametrize(
    ("size", "local", "arrived", "expected"),
    [
        (2, 1, [], [("data-parallel rank 1", "1", "1")]),
        (2, 1, [1], []),
        (2, 0, [], [("data-parallel rank 0", "0", "1"), ("data-parallel rank 1", "1", "1")]),
        (2, 0, [0], [("data-parallel rank 1", "1", "1")]),
        (6, 2, [], [("data-parallel ranks 2 to 3", "2", "2"), ("data-parallel ranks 4 to 5", "4", "2")]),
        (6, 2, [4], [("data-parallel ranks 2 to 3", "2", "2"), ("data-parallel rank 5", "5", "1")]),
        (6, 2, [3], [("data-parallel rank 2", "2", "1"), ("data-parallel ranks 4 to 5", "4", "2")]),
        (2, 2, [], []),
    ],
)
def test_data_parallel_ranks(size: int, local: int, arrived: list[int], expected: list[tuple[str, str, str]]) -> None:
    found = missing(parallel(data_parallel_size=size, data_parallel_size_local=local), arrived, 0, ARGS)
    assert ranks_of(found) == expected
    for _, line in words(found):
        assert line["--data-parallel-size"] == str(size)
        assert line["--data-parallel-address"] == "10.0.0.1"
        assert line["--data-parallel-rpc-port"] == "29550"


def test_followers_are_told_the_name_that_the_head_was_told() -> None:
    args = ARGS | {"data_parallel_address": "head.example", "data_parallel_rpc_port": 1}
    ((_, line),) = words(missing(parallel(data_parallel_size=2), [], 0, args))
    assert line["--data-parallel-address"] == "head.example"


@pytest.mark.parametrize(
    ("fields", "arrived", "workers", "nodes"),
    [
        ({"nnodes": 2, "nnodes_within_dp": 2, "world_size": 2}, [], 0, [1]),
        ({"nnodes": 2, "nnodes_within_dp": 2, "world_size": 2}, [], 1, []),
        ({"nnodes": 4, "nnodes_within_dp": 4, "world_size": 8}, [], 5, [1, 2, 3]),
        ({"nnodes": 4, "nnodes_within_dp": 4, "world_size": 8}, [], 6, []),
        # Two data-parallel ranks of two nodes each, and of half a node each.
        ({"nnodes": 4, "nnodes_within_dp": 2, "world_size": 4, "data_parallel_size": 2}, [], 0, [1, 2, 3]),
        ({"nnodes": 4, "nnodes_within_dp": 2, "world_size": 4, "data_parallel_size": 2}, [1], 0, [1]),
        ({"nnodes": 2, "world_size": 2, "data_parallel_size": 4, "data_parallel_size_local": 2}, [], 0, [1]),
        ({"nnodes": 2, "world_size": 2, "data_parallel_size": 4, "data_parallel_size_local": 2}, [2, 3], 0, []),
    ],
)
def test_nodes(fields: dict[str, Any], arrived: list[int], workers: int, nodes: list[int]) -> None:
    args = ARGS | {"nnodes": fields["nnodes"], "master_addr": "10.0.0.1", "master_port": 29501}
    args |= {"tensor_parallel_size": fields["world_size"]}
    found = words(missing(parallel(**fields), arrived, workers, args))
    assert [name for name, _ in found] == [f"node {node}" for node in nodes]
    assert [line["--node-rank"] for _, line in found] == [str(node) for node in nodes]
    for _, line in found:
        assert line["--nnodes"] == str(fields["nnodes"])
        assert line["--master-addr"] == "10.0.0.1"
        assert line["--master-port"] == "29501"
        assert line["--tensor-parallel-size"] == str(fields["world_size"])


def test_who_waits_and_where() -> None:
    alone, wide = parallel(), parallel(nnodes=2, nnodes_within_dp=2, world_size=4, master_addr="10.0.0.9")
    two = parallel(data_parallel_size=2)
    assert [head_address(each) for each in (alone, wide, two)] == ["", "10.0.0.9", "10.0.0.1"]
    assert [waits_for_ranks(each) for each in (alone, wide, two)] == [False, False, True]
    assert [remote_workers(each) for each in (alone, wide, two)] == [0, 2, 0]
    # Ray places its ranks itself, and behind another balancer each frontend has its own.
    ray, apart = (
        parallel(data_parallel_size=2, **other)
        for other in ({"data_parallel_backend": "ray"}, {"local_engines_only": True})
    )
    assert [head_address(each) for each in (ray, apart)] == ["", "10.0.0.1"]
    assert [has_followers(each) for each in (alone, wide, two, ray, apart)] == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"distributed_executor_backend": "external_launcher"}, "torchrun"),
        ({"node_rank": 1, "nnodes": 2}, "run.sh serve"),
    ],
)
def test_what_no_head_can_be(args: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(args))) as caught:
        check_head(args)
    assert named in str(caught.value)


@pytest.mark.parametrize("args", [{}, {"node_rank": 0}, {"distributed_executor_backend": "ray"}])
def test_what_a_head_can_be(args: dict[str, Any]) -> None:
    check_head(args)


def test_experts_on_cpus() -> None:
    check_experts(parallel(world_size=2, nnodes=2))
    check_experts(parallel(enable_expert_parallel=True))
    with pytest.raises(InvalidRequest, match=r"data_parallel_size: .*tensor_parallel_size alone"):
        check_experts(parallel(data_parallel_size=2))
    with pytest.raises(InvalidRequest, match=r"enable_expert_parallel: .*tensor_parallel_size alone"):
        check_experts(parallel(world_size=2, enable_expert_parallel=True))


def test_what_experts_on_cpus_need_vllm_still_lacks() -> None:
    assert CpuCommunicator.all_gatherv is DeviceCommunicatorBase.all_gatherv


def test_the_words_of_a_line() -> None:
    args = {"a": True, "b_c": False, "d": None, "e": {"f": [1]}, "g": ["h", "i j"], "k": 0.5, "l": ""}
    assert list(flags(args)) == ["--a", "--no-b-c", "--e", '{"f": [1]}', "--g", "h", "i j", "--k", "0.5"]


def test_vllm_reads_a_line_back_as_the_head_was_told() -> None:
    options = pb.ModelOptions(
        Model="org/model",
        DType="float32",
        MaxModelLen=512,
        EnforceEager=True,
        TrustRemoteCode=True,
        LimitImagePerPrompt=2,
        Options=["--max-num-seqs:8", "--no-enable-prefix-caching"],
        EngineArgs='{"hf_overrides": {"a b": "c\'d"}, "seed": 7, "data_parallel_size": 3, "hf_token": "hf_secret",'
        ' "data_parallel_address": "10.0.0.1", "generation_config": "vllm", "enable_expert_parallel": true,'
        ' "device_ids": [2, 3]}',
    )
    plan = plan_load(options)
    assert dataclasses.replace(plan, rank_timeout=1) == plan
    shared = plan.shared_args("qwen3")
    (group,) = missing(parallel(data_parallel_size=3, data_parallel_size_local=2), [], 0, shared)
    assert "hf_secret" not in group.line
    _, *rest = shlex.split(group.line)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(rest[1:])
    read = AsyncEngineArgs.from_cli_args(parsed)
    told = LoadPlan(plan.engine_args).build("qwen3")
    places = {"data_parallel_size_local": 1, "data_parallel_start_rank": 2, "data_parallel_rpc_port": 29550}
    assert {name: getattr(read, name) for name in places} == places
    frontend = {"served_model_name", "allowed_media_domains", "hf_token", "kv_cache_memory_bytes", "model"}
    # Unset there and here are two values.
    frontend |= {"enable_lora", "mm_device_do_normalize", "reasoning_parser_plugin"}
    for field in dataclasses.fields(told):
        if field.name not in frontend | places.keys():
            assert getattr(read, field.name) == getattr(told, field.name), field.name


def test_vllm_reads_config_objects_back_as_they_were_written() -> None:
    written = {
        "compilation_config": '{"mode": 0, "compile_sizes": [1, 2]}',
        "ec_transfer_config": '{"ec_connector": "a", "ec_role": "ec_both", "engine_id": "b"}',
        "kv_transfer_config": '{"kv_connector": "a", "kv_role": "kv_both", "engine_id": "b",'
        ' "kv_connector_extra_config": {"size": 2k, "deep": [{}]}}',
        "pooler_config": '{"task": "embed"}',
    }
    entries = [f"--{name.replace('_', '-')}:{text}" for name, text in written.items()]
    plan = plan_load(pb.ModelOptions(Model="org/model", Options=entries))
    shared = plan.shared_args(None)
    # A command line has no objects of Python's.
    assert shared["kv_transfer_config"]["kv_connector_extra_config"] == {"size": 2000, "deep": [{}]}
    (group,) = missing(parallel(data_parallel_size=2), [], 0, shared)
    _, *rest = shlex.split(group.line)
    read = AsyncEngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(rest[1:]))
    told = plan.build()
    for name in written:
        assert dataclasses.is_dataclass(getattr(told, name))
        assert getattr(read, name) == getattr(told, name), name
