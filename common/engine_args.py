"""`ModelOptions` -> `AsyncEngineArgs`, by the orchestrator's precedence.

Typed fields come first, then `Options` entries that start with `--` (vLLM's own flags), then the `EngineArgs` JSON,
which is strict and wins. Options without dashes are the backend's own, `key:value`; a user's dashed spelling of a
parser beats them, because the orchestrator appends its defaults in that form.
"""

import dataclasses
import logging
import math
import os
from typing import Any

from vllm import AsyncEngineArgs, envs
from vllm.config import ModelConfig
from vllm.platforms import current_platform

from common import network, worker_memory
from common.admission import Limits
from common.cpu_defaults import cpu_defaults
from common.engine_fields import FIELDS, STRUCTURED_OUTPUTS, as_config, checked, engine_args_json
from common.errors import InvalidRequest
from common.gguf_plan import GGUFPlan, plan_gguf
from common.lora import NO_ADAPTERS, AdapterPlan, plan_adapters
from common.media_connector import CONNECTOR, NO_DOMAIN
from common.model_source import resolve_model
from common.options import flag_values, split_options
from common.pb import backend_pb2 as pb
from common.reranker_files import head_overrides, read_template
from common.topology import check_head
from common.wording import first_problem

logger = logging.getLogger(__name__)

# One vector for each token: the caller pools.
_UNPOOLED = "token_embed"
# How long a head waits for ranks of other machines, in seconds.
RANK_TIMEOUT = 600.0
# The orchestrator sets these in EngineArgs unless its user does, there or as an option.
_IMPOSED = ("enable_prefix_caching", "enable_chunked_prefill")


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """All that decides how a model is loaded; two equal plans load the same."""

    engine_args: dict[str, Any]
    """Keyword arguments of `AsyncEngineArgs`, `model` among them, `reasoning_parser` not."""
    tool_parser: str | None = None
    """What was asked for: a name in vLLM's registry, "none", or None to choose by the model."""
    reasoning_parser: str | None = None
    """Likewise."""
    ignore_seed: bool = False
    """Whether requests are sampled without their seeds."""
    adapters: AdapterPlan = NO_ADAPTERS
    reranking: bool = False
    """Whether a model that could do more is loaded to rank documents."""
    score_template: str | None = None
    """The template of a cross-encoder's prompts; None: the model's own."""
    imposed: frozenset[str] = frozenset()
    """Engine arguments that the orchestrator switches on for every model, suitable or not."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """What is admitted where `engine_args` don't say."""
    gguf: GGUFPlan | None = None
    """How the model's folder is made, where it is a GGUF file."""
    rank_timeout: float = dataclasses.field(default=RANK_TIMEOUT, compare=False)
    """Seconds that the load waits for ranks of other machines."""
    scraped: bool = True
    """Whether anybody can ask the process for vLLM's own metrics."""

    @property
    def model(self) -> str:
        """A folder, or a hub id."""
        return str(self.engine_args["model"])

    @property
    def traces_endpoint(self) -> str | None:
        """Where vLLM sends a span for each request; None without tracing."""
        return self.engine_args.get("otlp_traces_endpoint") or None

    def fitted(self, config: ModelConfig) -> "LoadPlan":
        """The plan without what is imposed on it and vLLM does not support for this kind of model, and as it ranks.

        Raises:
            InvalidRequest: it is to rank documents, and it is not known how it does; or it takes no adapters.

        """
        self.adapters.check_model(config)
        if self.reranking and (overrides := head_overrides(config, self.engine_args)):
            return dataclasses.replace(self, engine_args=self.engine_args | {"hf_overrides": overrides})
        supported = {
            "enable_prefix_caching": config.is_prefix_caching_supported,
            "enable_chunked_prefill": config.is_chunked_prefill_supported,
        }
        dropped = {name for name in self.imposed & self.engine_args.keys() if not supported[name]}
        if not dropped:
            return self
        logger.info("load: without %s, which vLLM does not support for this model", ", ".join(sorted(dropped)))
        kept = {name: value for name, value in self.engine_args.items() if name not in dropped}
        return dataclasses.replace(self, engine_args=kept)

    def build(self, reasoning_parser: str | None = None) -> AsyncEngineArgs:
        """The arguments as vLLM takes them; it converts and checks some values here.

        `reasoning_parser` is the one that the answers will be parsed with: the engine keeps grammars out of thoughts
        by it.

        Raises:
            InvalidRequest: vLLM refused a value.

        """
        args = self._completed(reasoning_parser)
        for name in ("data_parallel_address", "master_addr"):
            if args.get(name):
                args[name] = network.own_address(args[name])
        try:
            return AsyncEngineArgs(**{name: as_config(name, value) for name, value in args.items()})
        except (ValueError, TypeError) as error:
            raise InvalidRequest("EngineArgs", first_problem(error)) from error

    def shared_args(self, reasoning_parser: str | None) -> dict[str, Any]:
        """The engine arguments as `build` has them, but for what this machine's memory and names make of them."""
        args = self._completed(reasoning_parser)
        if "kv_cache_memory_bytes" not in self.engine_args:
            args.pop("kv_cache_memory_bytes", None)
        return args

    def _completed(self, reasoning_parser: str | None) -> dict[str, Any]:
        args = {"worker_extension_cls": worker_memory.EXTENSION} | self.engine_args
        args["reasoning_parser"] = reasoning_parser or ""
        # Not part of the plan: the memory that is free differs from call to call.
        return cpu_defaults(args) | args if current_platform.is_cpu() else args


def plan_load(
    options: pb.ModelOptions,
    limits: Limits = Limits(),  # noqa: B008  # it is frozen
    *,
    scraped: bool = True,
) -> LoadPlan:
    """The plan that `options` ask for, in a process with these limits.

    Raises:
        InvalidRequest: an option is unknown, ill-typed or can't be used; names the closest valid one.
        LoadFailed: the model is a GGUF file that has to be converted, and there is too little disk for it.

    """
    if options.SwapSpace:
        logger.warning("SwapSpace: vLLM 0.32 has no swap space; the value %d has no effect", options.SwapSpace)
    model = resolve_model(options)
    args: dict[str, Any] = {"structured_outputs_config": STRUCTURED_OUTPUTS, "allowed_media_domains": [NO_DOMAIN]}
    args |= limits.engine_args()
    args |= {"model": model, "served_model_name": options.Model or model}
    adapters = plan_adapters(options, model)
    args |= _typed_fields(options) | adapters.engine_args
    own, flags = split_options(options.Options, options.ModelPath)
    flagged = flag_values(flags, FIELDS)
    given = engine_args_json(options.EngineArgs)
    args |= flagged | given
    args |= _pooling(own.get("pooling", ""), args)
    gguf = _gguf(model, own.get("gguf"), args)
    adapters.check(args)
    check_head(args)
    _check_structured_outputs(args["structured_outputs_config"])
    imposed = frozenset(name for name in _IMPOSED if given.get(name) is True and name not in flagged)
    if envs.VLLM_MEDIA_CONNECTOR != CONNECTOR:
        raise InvalidRequest(
            "VLLM_MEDIA_CONNECTOR", f"must be {CONNECTOR} or unset; another would fetch without limits"
        )
    media_folder = args.get("allowed_local_media_path")
    if media_folder and not os.path.isdir(media_folder):
        raise InvalidRequest("allowed_local_media_path", f"{media_folder} is not a folder")
    if args.get("otlp_traces_endpoint") and args.get("disable_log_stats"):
        # vLLM's spans are made of its statistics; its engine would die of the first request.
        raise InvalidRequest(
            "otlp_traces_endpoint", "traces need the engine's statistics; leave DisableLogStatus unset"
        )
    reasoning_parser = args.pop("reasoning_parser", None) or own.get("reasoning_parser")
    return LoadPlan(
        args,
        tool_parser=own.get("tool_parser") or None,
        reasoning_parser=reasoning_parser or None,
        ignore_seed=_switch("ignore_seed", own.get("ignore_seed", "false")),
        adapters=adapters,
        reranking=options.Reranking,
        score_template=_score_template(own.get("score_template"), options),
        imposed=imposed,
        limits=limits,
        gguf=gguf,
        rank_timeout=_seconds("rank_timeout", own.get("rank_timeout") or str(RANK_TIMEOUT)),
        scraped=scraped,
    )


def _gguf(model: str, form: str | None, args: dict[str, Any]) -> GGUFPlan | None:
    """What becomes of the model if it is a GGUF file; `args` then name the folder that is made of it."""
    if not os.path.isfile(model):
        if form is not None:
            raise InvalidRequest("Options", f"gguf:{form} is for GGUF files")
        return None
    plan = plan_gguf(model, form or "", own_tokenizer=bool(args.get("tokenizer")))
    for name in ("quantization", "load_format"):
        if not plan.native and args.get(name) == "gguf":
            del args[name]  # so vLLM's documentation has it, for its plugin
    args |= plan.engine_args
    return plan


def _check_structured_outputs(config: dict[str, Any]) -> None:
    if (backend := config.get("backend")) != "xgrammar":
        raise InvalidRequest(
            "structured_outputs_config",
            f"backend {backend!r}: use xgrammar, which requests are checked against before they reach the engine",
        )


def _score_template(name: str | None, options: pb.ModelOptions) -> str | None:
    if not name:
        return None
    if not options.Reranking:
        raise InvalidRequest("Options", f"score_template:{name} is for models that are loaded with Reranking")
    return read_template(name, options.ModelPath)


def _switch(name: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise InvalidRequest("Options", f"{name}:{value} is unknown; use {name}:true or {name}:false")
    return value == "true"


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest("Options", f"{name}:{value} is unknown; use a number of seconds above 0")
    return seconds


def _pooling(asked: str, args: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments that the option `pooling` adds to `args`; what they say themselves wins."""
    if asked not in ("", "none"):
        raise InvalidRequest("Options", f"pooling:{asked} is unknown; use pooling:none, or vLLM's --pooler-config")
    if not asked:
        return {}
    config = args.get("pooler_config") or {}
    return {
        "runner": args.get("runner", "pooling"),
        "pooler_config": config | {"task": config.get("task") or _UNPOOLED},
    }


def _typed_fields(options: pb.ModelOptions) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if options.Embeddings or options.Reranking:
        # Otherwise vLLM goes by the model, and loads one that could do both for generation.
        args["runner"] = "pooling"
    for field, name in (
        ("Quantization", "quantization"),
        ("LoadFormat", "load_format"),
        ("DType", "dtype"),
        ("Tokenizer", "tokenizer"),
    ):
        if text := getattr(options, field):
            args[name] = checked(field, name, text)
    for field, name in (
        ("TrustRemoteCode", "trust_remote_code"),
        ("EnforceEager", "enforce_eager"),
        ("DisableLogStatus", "disable_log_stats"),
    ):
        if getattr(options, field):
            args[name] = True
    for field, name in (("MaxModelLen", "max_model_len"), ("TensorParallelSize", "tensor_parallel_size")):
        if number := getattr(options, field):
            if number < 0:
                raise InvalidRequest(field, f"{number} is negative; use 1 or more, or 0 for vLLM's own choice")
            args[name] = number
    if utilization := options.GPUMemoryUtilization:
        if not (math.isfinite(utilization) and 0 < utilization <= 1):
            raise InvalidRequest("GPUMemoryUtilization", f"{utilization} is not above 0 and at most 1")
        args["gpu_memory_utilization"] = round(utilization, 6)
    limits = {
        modality: limit
        for modality, limit in (
            ("image", options.LimitImagePerPrompt),
            ("video", options.LimitVideoPerPrompt),
            ("audio", options.LimitAudioPerPrompt),
        )
        if limit
    }
    if any(limit < 0 for limit in limits.values()):
        raise InvalidRequest("LimitImagePerPrompt, LimitVideoPerPrompt, LimitAudioPerPrompt", "use 0 or more")
    if limits:
        args["limit_mm_per_prompt"] = limits
    return args
