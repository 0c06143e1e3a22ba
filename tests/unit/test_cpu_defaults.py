"""What is chosen for a CPU where the user chooses nothing."""

from typing import Any

import psutil
import pytest
from vllm.utils.import_utils import resolve_obj_by_qualname

from common import cgroup
from common import cpu_defaults as room
from common.cpu_defaults import GIB, MOST_KV_BYTES, ONE_PROCESS, available_memory, cpu_defaults
from common.one_process import OneProcess


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose flags and free memory a test sets."""
    machine: dict[str, Any] = {"flags": {"avx2"}, "memory": 8 * GIB}
    monkeypatch.setattr(room, "cpu_flags", lambda: machine["flags"])
    monkeypatch.setattr(room, "available_memory", lambda: machine["memory"])
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    return machine


def test_nothing_given(machine: dict[str, Any]) -> None:
    assert cpu_defaults({}) == {
        "enforce_eager": True,
        "dtype": "float32",
        "kv_cache_memory_bytes": 2 * GIB,
        "distributed_executor_backend": ONE_PROCESS,
    }
    assert resolve_obj_by_qualname(ONE_PROCESS) is OneProcess


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16"])
def test_bfloat16_where_the_cpu_has_units_for_it(machine: dict[str, Any], flag: str) -> None:
    machine["flags"] = {"avx2", flag}
    assert "dtype" not in cpu_defaults({})


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"enforce_eager": False}, "enforce_eager"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"kv_cache_memory_bytes": 5}, "kv_cache_memory_bytes"),
        ({"gpu_memory_utilization": 0.5}, "kv_cache_memory_bytes"),
        ({"num_gpu_blocks_override": 5}, "kv_cache_memory_bytes"),
        ({"distributed_executor_backend": "mp"}, "distributed_executor_backend"),
        ({"tensor_parallel_size": 2}, "distributed_executor_backend"),
        ({"pipeline_parallel_size": 2}, "distributed_executor_backend"),
        ({"data_parallel_size": 2}, "distributed_executor_backend"),
        ({"nnodes": 2}, "distributed_executor_backend"),
        ({"kv_transfer_config": {"kv_connector": "a"}}, "distributed_executor_backend"),
    ],
)
def test_what_the_user_says_stays(machine: dict[str, Any], given: dict[str, Any], missing: str) -> None:
    assert cpu_defaults({}).keys() - cpu_defaults(given).keys() == {missing}


def test_the_variable_of_vllm_counts_too(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "kv_cache_memory_bytes" not in cpu_defaults({})


def test_the_cache_has_a_ceiling(machine: dict[str, Any]) -> None:
    machine["memory"] = 1000 * GIB
    assert cpu_defaults({})["kv_cache_memory_bytes"] == MOST_KV_BYTES


@pytest.mark.parametrize(
    ("given", "workers"),
    [
        ({"tensor_parallel_size": 4}, 4),
        ({"pipeline_parallel_size": 2}, 2),
        ({"data_parallel_size": 4}, 4),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}, 8),
        # Those of other machines take nothing of this one.
        ({"data_parallel_size": 4, "data_parallel_size_local": 1}, 1),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2, "tensor_parallel_size": 2}, 4),
        ({"data_parallel_size": 4, "data_parallel_size_local": 0}, 1),
        ({"tensor_parallel_size": 4, "nnodes": 2}, 2),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4, "nnodes": 4}, 2),
        ({"tensor_parallel_size": 2, "data_parallel_size": 4, "data_parallel_size_local": 2, "nnodes": 2}, 4),
        # Unset, as the JSON has it.
        ({"tensor_parallel_size": 2, "data_parallel_size_local": None}, 2),
    ],
)
def test_the_workers_of_a_machine_share_its_memory(
    machine: dict[str, Any], given: dict[str, Any], workers: int
) -> None:
    assert cpu_defaults(given)["kv_cache_memory_bytes"] == 2 * GIB // workers
    machine["memory"] = 1000 * GIB
    assert cpu_defaults(given)["kv_cache_memory_bytes"] == MOST_KV_BYTES


@pytest.mark.parametrize(("left", "expected"), [(None, 100), (30, 30), (500, 100), (0, 0)])
def test_memory_of_the_control_group(left: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "memory_left", lambda: left)
    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"available": 100}))
    assert available_memory() == expected


def test_this_machine() -> None:
    assert available_memory() > 0
    assert all(flag == flag.strip() for flag in room.cpu_flags())
