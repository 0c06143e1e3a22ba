"""What an installation has and would use: the rows of `run.sh --check`.

Like `common.model` it imports vLLM. Nothing is downloaded and no process is started.
"""

import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import torch
import vllm
from vllm.platforms import current_platform

from common import cpu_threads, preload
from common.cpu_defaults import available_memory, cpu_defaults, cpu_flags
from common.engine_args import plan_load
from common.engine_config import configure
from common.errors import BackendError, LoadFailed
from common.gguf_plan import GGUFPlan
from common.pb import backend_pb2 as pb
from common.vllm_env import DEFAULTS
from common.wording import first_problem, in_bytes

# What vLLM has kernels for.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def environment() -> Iterator[tuple[str, str]]:
    """Name and value of what this machine and this environment give.

    Raises:
        LoadFailed: no model can be served here; the text is the reason.

    """
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "vLLM", vllm.__version__
    yield "torch", str(torch.__version__)
    flags = cpu_flags()
    known = " ".join(flag for flag in _TELLING_FLAGS if flag in flags)
    yield "CPU", f"{len(os.sched_getaffinity(0))} for this process; {known or 'none of the features that vLLM uses'}"
    yield "memory", f"{in_bytes(available_memory())} free for this process"
    yield "temporary folder", tempfile.gettempdir()
    yield "models of the hub", str(huggingface_hub.constants.HF_HUB_CACHE)
    if current_platform.is_unspecified():
        raise LoadFailed("vLLM finds no device that it has kernels for")
    if current_platform.is_cuda_alike() and not torch.cuda.is_available():
        raise LoadFailed(f"vLLM is built for {current_platform.device_name}, and PyTorch finds no such device")
    yield "device", _devices()
    if current_platform.is_cpu():
        defaults = cpu_defaults({})
        defaults["kv_cache_memory_bytes"] = in_bytes(defaults.get("kv_cache_memory_bytes", 0))
        if space := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            defaults["kv_cache_memory_bytes"] = f"{space} GiB (VLLM_CPU_KVCACHE_SPACE)"
        yield "threads", cpu_threads.bind(ranks=0)
        yield "preloaded for engines", os.environ.get(preload.VARIABLE) or "only PyTorch's OpenMP"
        yield "default engine arguments", ", ".join(f"{name} {value}" for name, value in sorted(defaults.items()))
    yield "environment for vLLM", ", ".join(f"{name}={os.environ.get(name, '')}" for name in DEFAULTS)


def model(name: str) -> Iterator[tuple[str, str]]:
    """Name and value of how the model `name`, a folder, a GGUF file or a hub id, would be loaded.

    Raises:
        LoadFailed: it can't be; the text is the reason.

    """
    try:
        plan = plan_load(pb.ModelOptions(Model=name))
        folder = Path(plan.model)
        if plan.gguf is not None:
            yield "GGUF", _gguf(plan.gguf)
            if not plan.gguf.made:
                return
        if not folder.is_dir():
            yield "model", f"{plan.model}, a hub id; LoadModel fetches what is not in the cache"
            return
        yield "model", plan.model
        config, parsers = configure(plan)
    except BackendError as error:
        raise LoadFailed(f"{name}: {error}") from error
    except Exception as error:
        raise LoadFailed(f"{name}: {type(error).__name__}: {first_problem(error)}") from error
    found = config.model_config
    yield "architecture", f"{', '.join(found.architectures)}, {found.runner_type} runner"
    yield "engine", f"dtype {str(found.dtype).removeprefix('torch.')}, quantization {found.quantization or 'none'}"
    yield "context", f"{found.max_model_len} tokens"
    size = next(
        (size for pattern in _WEIGHTS if (size := sum(each.stat().st_size for each in folder.glob(pattern)))), 0
    )
    yield "weights", in_bytes(size)
    yield "parsers", parsers.why
    if not size:
        raise LoadFailed(f"{name}: the folder has no weights ({', '.join(_WEIGHTS)})")
    if current_platform.is_cpu() and size > available_memory():
        raise LoadFailed(
            f"{name}: its weights take {in_bytes(size)}, and {in_bytes(available_memory())} of memory are free"
        )


def _gguf(plan: GGUFPlan) -> str:
    if plan.made:
        return f"{plan.source}, converted before"
    if plan.native:
        return f"{plan.source}; LoadModel writes its configuration and tokenizer to {plan.folder}"
    return f"{plan.source}; LoadModel converts it, once, into {plan.folder}: {in_bytes(plan.size)} as {plan.stored_as}"


def _devices() -> str:
    if current_platform.is_cpu():
        return "CPU"
    count = current_platform.device_count()
    names = {current_platform.get_device_name(index) for index in range(count)}
    memory = in_bytes(current_platform.get_device_total_memory(0))
    return f"{count} x {', '.join(sorted(names))}, {memory} each ({current_platform.device_name})"
