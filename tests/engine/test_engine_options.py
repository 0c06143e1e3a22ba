"""What is passed on to vLLM as it is: speculation, caches, chunks and precision leave the answers as they are."""

import json
from typing import Any

import pytest
import torch

from common.errors import LoadFailed
from common.model import Model
from tests.engine.conftest import Engines
from tests.engine.wire import options, predict, stream
from tests.models.script import line

PARSERS = ("tool_parser:hermes", "reasoning_parser:none")
LINES = ("plain", "history", "long", "tool", "nested_tool", "unicode")
EIGHT_BITS = "8-bit cache"
PASSED_ON: dict[str, dict[str, Any]] = {
    "speculation": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}},
    "chunks": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True, "enable_prefix_caching": False},
    EIGHT_BITS: {"kv_cache_dtype": "fp8"},
}


async def check(model: Model, name: str) -> None:
    asked = line(name)
    whole, _ = await predict(model, options(asked))
    streamed, _ = await stream(model, options(asked))
    for answer in (whole, streamed):
        assert answer.message.strip() == asked.content.strip()
        assert answer.calls == [(call.name, call.arguments) for call in asked.tool_calls]


@pytest.mark.parametrize("kind", PASSED_ON)
async def test_answers_stay_as_they_are(engines: Engines, kind: str) -> None:
    if kind == EIGHT_BITS and torch.backends.cpu.get_cpu_capability() != "AVX512":
        with pytest.raises(LoadFailed, match="FP8 KV cache on CPU requires"):
            await engines.get(*PARSERS, EngineArgs=json.dumps(PASSED_ON[kind]))
        return
    model = await engines.get(*PARSERS, EngineArgs=json.dumps(PASSED_ON[kind]))
    for name in LINES:
        await check(model, name)


async def test_what_the_orchestrator_imposes_and_typed_fields_reach_the_engine(engines: Engines) -> None:
    imposed = {"enable_prefix_caching": True, "enable_chunked_prefill": True}
    model = await engines.get(*PARSERS, "--max-num-seqs:7", EngineArgs=json.dumps(imposed))
    config = model._engine.llm.vllm_config
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_seqs == 7
    await check(model, "plain")
