"""What vLLM itself does not choose well on a CPU; whatever the user says comes before it.

dtype              float32 where the CPU has no BF16 units: it decodes more than twice as fast there
enforce_eager      true: compiling gains 7 % and costs minutes at each load, and fails without a compiler
kv_cache_memory_bytes  a quarter of the memory that is free, shared among this machine's workers, at most 4 GiB each;
                   vLLM would ask for 92 % of all memory, and fail when anything else uses more than the rest
distributed_executor_backend  one process where there is one worker, see `one_process`; vLLM would have two
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from common import cgroup

GIB = 1024**3
MOST_KV_BYTES = 4 * GIB
BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})

# What vLLM calls an executor of its users' own.
ONE_PROCESS = "common.one_process.OneProcess"
# Engine arguments that ask for more workers or more machines than one: the first three for each data-parallel rank.
_WORKERS_OF_A_RANK = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
_SEVERAL = (*_WORKERS_OF_A_RANK, "data_parallel_size", "nnodes")

_OTHERWISE = ("distributed_executor_backend", "kv_transfer_config", "ec_transfer_config")


def cpu_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Engine arguments to add to those `given` by the user."""
    defaults: dict[str, Any] = {}
    if "enforce_eager" not in given:
        defaults["enforce_eager"] = True
    if "dtype" not in given and not cpu_flags() & BF16_FLAGS:
        defaults["dtype"] = "float32"
    sizes = ("kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override")
    if not any(name in given for name in sizes) and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        defaults["kv_cache_memory_bytes"] = min(available_memory() // 4 // _workers_here(given), MOST_KV_BYTES)
    if _is_alone(given):
        defaults["distributed_executor_backend"] = ONE_PROCESS
    return defaults


def _workers_here(given: Mapping[str, Any]) -> int:
    """The engine's workers on this machine, each of which reserves a KV cache; as `ParallelConfig` spreads them."""
    ranks, nodes = (int(given.get(name) or 1) for name in ("data_parallel_size", "nnodes"))
    if nodes == 1 and (local := given.get("data_parallel_size_local")) is not None:
        ranks = local  # the others are on machines of their own
    return max(ranks * math.prod(int(given.get(name) or 1) for name in _WORKERS_OF_A_RANK) // nodes, 1)


def _is_alone(given: Mapping[str, Any]) -> bool:
    alone = all((given.get(name) or 1) == 1 for name in _SEVERAL)
    # Whoever sends KV blocks elsewhere has threads of his own, which vLLM leaves a core to.
    return alone and not any(given.get(name) for name in _OTHERWISE)


def cpu_flags() -> set[str]:
    """The instruction sets that the first CPU names in /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    return {flag for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE) for flag in line.split()}


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its control groups where those have less."""
    available = int(psutil.virtual_memory().available)
    left = cgroup.memory_left()
    return available if left is None else min(available, left)
