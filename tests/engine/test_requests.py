"""Requests that end early, and the prompts of all: tokens, cancellation, an engine that goes away."""

import asyncio
import contextlib

import pytest

from common.errors import EngineGone, InvalidRequest, Unsupported
from common.messages import MOST_MESSAGES
from common.model import Model
from common.pb import backend_pb2 as pb
from common.tokens import MOST_CHARACTERS
from tests.engine.conftest import Engines
from tests.engine.wire import options, predict
from tests.models.script import line

ENDLESS = options(line("long"), IgnoreEOS=True)


async def _idle(model: Model) -> None:
    async with asyncio.timeout(10):
        while model.running_requests:  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.01)


async def test_tokens_and_back(model: Model) -> None:
    text = "Grüße, 東京 \U0001f468\u200d\U0001f469\u200d\U0001f467!"
    tokenised = await model.tokenize(pb.PredictOptions(Prompt=text))
    assert tokenised.length == len(tokenised.tokens) > 0
    assert (await model.detokenize(pb.DetokenizeRequest(tokens=tokenised.tokens))).content == text


async def test_tokenize_sees_what_generation_sees(model: Model) -> None:
    for name in ("plain", "tool", "raw"):
        tokenised = await model.tokenize(options(line(name)))
        _, reply = await predict(model, options(line(name), Tokens=1))
        assert tokenised.length == reply.prompt_tokens


@pytest.mark.parametrize("template", [False, True])
async def test_an_empty_prompt_is_counted(model: Model, template: bool) -> None:
    empty = pb.PredictOptions(UseTokenizerTemplate=template, Temperature=-1)
    text = await model.tokenize(pb.PredictOptions(Prompt="a"))
    tokenised = await model.tokenize(empty)
    assert list(tokenised.tokens) == list(text.tokens)[: tokenised.length]
    assert tokenised.length == text.length - 1
    with pytest.raises(InvalidRequest, match=r"^Prompt: .*is empty"):
        await model.predict(pb.PredictOptions(UseTokenizerTemplate=template))


async def test_tokenize_longer_than_the_context(model: Model) -> None:
    assert (await model.tokenize(pb.PredictOptions(Prompt="word " * 5000))).length > 5000


async def test_what_a_template_makes_long_is_not_tokenized(model: Model) -> None:
    # The template's words around each are 29 characters, and those that are counted with it 16.
    length = MOST_CHARACTERS // MOST_MESSAGES - 20
    many = [pb.Message(role="user", content="a" * length)] * MOST_MESSAGES
    with pytest.raises(
        InvalidRequest, match=r"^Messages: has \d{7} characters when it is rendered; use at most 2000000$"
    ):
        await model.tokenize(pb.PredictOptions(UseTokenizerTemplate=True, Messages=many))


@pytest.mark.parametrize("token", [-1, 2**31 - 1])
async def test_detokenize_refuses_what_is_no_token(model: Model, token: int) -> None:
    with pytest.raises(InvalidRequest, match=r"tokens\[1\]"):
        await model.detokenize(pb.DetokenizeRequest(tokens=[1, token]))


@pytest.mark.parametrize("chunks", [0, 1, 20])
async def test_closed_stream_leaves_the_engine(model: Model, chunks: int) -> None:
    replies = model.predict_stream(ENDLESS)
    for _ in range(chunks):
        await anext(replies)
    if chunks:
        assert model.running_requests == 1
    await replies.aclose()
    await _idle(model)


@pytest.mark.parametrize("delay", [0, 0.05, 0.5])
async def test_cancelled_answer_leaves_the_engine(model: Model, delay: float) -> None:
    task = asyncio.create_task(model.predict(ENDLESS))
    await asyncio.sleep(delay)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _idle(model)


async def test_many_cancelled_at_random_points(model: Model) -> None:
    async def reader(chunks: int) -> None:
        async with contextlib.aclosing(model.predict_stream(ENDLESS)) as replies:
            for _ in range(chunks):
                await anext(replies)

    await asyncio.gather(*(reader(1 + 3 * index) for index in range(32)))
    await _idle(model)


async def test_it_embeds_nothing(model: Model) -> None:
    with pytest.raises(Unsupported, match=r"^Embedding needs an embedding model, .* the loaded model generates text"):
        await model.embed(pb.PredictOptions(Embeddings="a"))


async def test_closing_ends_what_runs(engines: Engines, model: Model) -> None:
    streams = [asyncio.create_task(_exhaust(model)) for _ in range(4)]
    wholes = [asyncio.create_task(model.predict(ENDLESS)) for _ in range(4)]
    await asyncio.sleep(1)
    closing = asyncio.create_task(engines.close())
    async with asyncio.timeout(20):
        results = await asyncio.gather(*streams, *wholes, return_exceptions=True)
    await closing
    assert [type(result) for result in results] == [EngineGone] * 8


async def _exhaust(model: Model) -> None:
    async for _ in model.predict_stream(ENDLESS):
        pass
