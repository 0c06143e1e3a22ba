"""Requests that nobody waits for any more: none is left in the engine, and their KV blocks are free again."""

import asyncio
import random

import pytest
from vllm.v1.metrics.reader import Gauge, get_metrics_snapshot

from common.model import Model
from tests.engine.wire import options, predict, stream
from tests.models.script import line

CLIENTS = 200


def gauge(name: str) -> float:
    """The engine's own figure, of its last step."""
    (found,) = [metric for metric in get_metrics_snapshot() if metric.name == name]
    assert isinstance(found, Gauge)
    return float(found.value)


async def figures(model: Model) -> tuple[int, float, float, float]:
    """Unfinished, running, waiting, share of the KV cache in use; after a step of the engine that has nothing else."""
    await predict(model, options(line("plain")))
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    running, waiting, usage = (gauge(name) for name in names)
    return model.running_requests, running, waiting, usage


async def client(model: Model, generator: random.Random) -> None:
    """Goes away at a random token, or at a random moment."""
    request = options(line("long"), IgnoreEOS=True, Tokens=900)
    if generator.random() < 0.5:
        chunks = generator.randrange(50)
        replies = model.predict_stream(request)
        for _ in range(chunks):
            await anext(replies)
        await replies.aclose()
        return
    task = asyncio.create_task(predict(model, request) if generator.random() < 0.5 else stream(model, request))
    await asyncio.sleep(generator.uniform(0, 0.5))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_storm(model: Model) -> None:
    before = await figures(model)
    assert before[0] == 0
    generator = random.Random(1869)
    await asyncio.gather(*(client(model, generator) for _ in range(CLIENTS)))
    assert model.running_requests == 0
    assert await figures(model) == before
