"""What is decided before an engine starts: its configuration, its parsers, and variables that its processes read."""

import logging
import os

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.usage.usage_lib import UsageContext

from common import cpu_threads, links, one_process, topology
from common.cpu_defaults import GIB, available_memory
from common.engine_args import LoadPlan
from common.parsers import ParserChoice, choose_parsers

logger = logging.getLogger(__name__)

# What the user says about it, if anything.
_DYNAMO_DISABLE = os.environ.get("TORCHDYNAMO_DISABLE")
_LINK_TIMEOUT = os.environ.get(links.VARIABLE)


def configure(plan: LoadPlan) -> tuple[VllmConfig, ParserChoice]:
    """The engine's configuration, with the parsers that fit the model; reads its configuration and tokenizer."""
    config = plan.build().create_engine_config(UsageContext.ENGINE_CONTEXT)
    while (fitted := plan.fitted(config.model_config)) is not plan:
        plan, config = fitted, fitted.build().create_engine_config(UsageContext.ENGINE_CONTEXT)
    if current_platform.is_cpu() and config.model_config.is_moe:
        topology.check_experts(config.parallel_config)
    if why := _why_no_parsers(config):
        logger.info("load: no parsers: %s", why)
        return config, ParserChoice(None, None, why)
    parsers = choose_parsers(
        config.model_config,
        cached_tokenizer_from_config(config.model_config),
        tool_parser=plan.tool_parser,
        reasoning_parser=plan.reasoning_parser,
    )
    logger.info("load: %s", parsers.why)
    for harm in parsers.beware:
        logger.warning("load: %s", harm)
    if parsers.reasoning_parser:
        # From the start: vLLM derives more from it than the field.
        config = plan.build(parsers.reasoning_parser).create_engine_config(UsageContext.ENGINE_CONTEXT)
    return config, parsers


def watch_links(*, is_distributed: bool) -> None:
    """Make the engine's processes watch their connections where these lead to other machines."""
    if is_distributed:
        os.environ[links.VARIABLE] = str(links.timeout())
    elif _LINK_TIMEOUT is None:
        os.environ.pop(links.VARIABLE, None)


def compile_nothing(eager: bool) -> None:
    """Keep the sampler's few compiled functions of an eager CPU engine eager too.

    The first request for log-probabilities would otherwise hold up all others for 14 s.
    """
    if current_platform.is_cpu() and _DYNAMO_DISABLE is None:
        os.environ["TORCHDYNAMO_DISABLE"] = "1" if eager else "0"


def say_what_is_used(config: VllmConfig) -> None:
    """Choose the CPUs, and log them with the memory of the KV cache."""
    parallel = config.parallel_config
    ranks = max(parallel.local_world_size * parallel.data_parallel_size_local, 1)
    logger.info("load: %s", cpu_threads.bind(0 if one_process.is_used(config) else ranks))
    if size := config.cache_config.kv_cache_memory_bytes:
        logger.info("load: %.1f GiB for the KV cache, %.1f GiB are free", size / GIB, available_memory() / GIB)


def _why_no_parsers(config: VllmConfig) -> str | None:
    if config.model_config.skip_tokenizer_init:
        return "the model is loaded without a tokenizer"
    if config.model_config.runner_type == "pooling":
        # The orchestrator names parsers for some models by what they are called.
        return "the model is loaded for embeddings, ranking or classification, and writes nothing to parse"
    return None
