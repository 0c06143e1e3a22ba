"""What is told of a loaded model: its template, its markers, its counts, its memory."""

import asyncio
from pathlib import Path

import pytest
from safetensors import safe_open
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

from common.model import Model
from common.pb import backend_pb2 as pb
from tests.engine.wire import options, predict
from tests.models import ensure
from tests.models.script import line
from tests.models.training import prompt_of

# What does not describe the loaded model.
OTHER = pb.ModelOptions(Model="another", MMProj="x", Options=["tool_parser:none"])
_PROMPT = [{"role": "user", "content": "Hello!"}]


async def test_what_a_template_shows(model: Model) -> None:
    found = await model.metadata(OTHER)
    assert found.rendered_template == prompt_of(ensure("scripted"), _PROMPT)
    # The template has a switch, though nothing parses thoughts.
    assert found.supports_thinking
    assert found.media_marker == ""
    form = found.tool_format
    assert form.format_type == "json_native"
    assert (form.per_call_start, form.per_call_end) == ("<tool_call>\n", "\n</tool_call>")
    assert (form.name_field, form.args_field, form.id_field) == ("name", "arguments", "")
    assert list(form.parameter_order) == ["name", "arguments"]
    assert (form.section_start, form.section_end) == ("", "")
    assert (form.reasoning_start, form.reasoning_end) == ("", "")
    assert found == await model.metadata(pb.ModelOptions())


def counted(name: str) -> int:
    (found,) = [metric for metric in get_metrics_snapshot() if metric.name == name]
    assert isinstance(found, Counter)
    return int(found.value)


async def test_counts_are_those_of_the_engine(model: Model) -> None:
    before = await model.metrics()
    names = ("long", "plain", "unicode", "tool")
    replies = [reply for _, reply in await asyncio.gather(*(predict(model, options(line(name))) for name in names))]
    await asyncio.sleep(0.1)  # vLLM counts a step after it has handed out what came of it
    after = await model.metrics()
    assert after.tokens_generated - before.tokens_generated == sum(reply.tokens for reply in replies)
    assert after.prompt_tokens_processed - before.prompt_tokens_processed == sum(
        reply.prompt_tokens for reply in replies
    )
    assert after.tokens_generated == counted("vllm:generation_tokens")
    assert after.prompt_tokens_processed == counted("vllm:prompt_tokens")
    assert after.tokens_per_second > 0


async def test_memory_is_that_of_weights_and_cache(model: Model) -> None:
    found = model.memory()
    file = Path(ensure("scripted")) / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        stored = sum(tensors.get_tensor(name).numel() * 4 for name in tensors.keys())  # noqa: SIM118  # it is no dict
    # vLLM pads the vocabulary, and keeps the rotary embedding's table.
    assert stored <= found["weights"] < 3 * stored
    cache = model._engine.llm.vllm_config.cache_config
    # Keys and values, 3 layers of 2 heads of 64, float32.
    assert found["KV cache"] == pytest.approx(cache.num_gpu_blocks * cache.block_size * 2 * 3 * 2 * 64 * 4, rel=0.01)
