"""Which prompts are made at once and which in the thread of vLLM's renderer; and that they are the same."""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
from vllm import AsyncEngineArgs
from vllm.renderers import renderer_from_config
from vllm.renderers.params import ChatParams, TokenizeParams

from common import rendering
from common.embedding import Embedder
from common.embedding_request import embedding_request
from common.generator import Generator
from common.lora import NO_ADAPTERS, Adapters
from common.parsers import ParserChoice
from common.pb import backend_pb2 as pb
from common.rendering import MOST_CHARACTERS, MOST_MESSAGES, MOST_SECONDS, MOST_VARIABLES, REST_SECONDS, Renderer
from common.request import generation_request
from tests.models import ensure

LIMITS = TokenizeParams(max_total_tokens=None)
# As vLLM asks for a chat's text.
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 14}}},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"days": 2}'}}
TEMPLATE_KWARGS = {"tools": None, "tokenize": False, "add_generation_prompt": True, "enable_thinking": True}


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    with mock.patch.dict(os.environ):  # in which vLLM has something for its processes
        config = AsyncEngineArgs(model=str(ensure("smollm2"))).create_engine_config()
    renderer = renderer_from_config(config)
    yield renderer
    renderer.shutdown()


class Ours(Renderer):
    """Counts what its thread is given."""

    def __init__(self, renderer: Any) -> None:
        self.jobs = 0
        submit = renderer._executor.submit

        def counted(*job: Any) -> Any:
            self.jobs += 1
            return submit(*job)

        renderer._executor.submit = counted
        super().__init__(renderer)


@pytest.fixture
def ours(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ours]:
    monkeypatch.setattr(rendering, "MOST_SECONDS", 60.0)  # however slow the machine is
    yield Ours(theirs)
    del theirs._executor.submit


def chat(*contents: Any, **fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **fields} for content in contents]


def asked(messages: list[dict[str, Any]], **template_kwargs: Any) -> tuple[Any, ...]:
    return [messages], ChatParams(chat_template_kwargs={**TEMPLATE_KWARGS, **template_kwargs}), LIMITS


def tokens(prompt: Any) -> Any:
    return {key: value for key, value in prompt.items() if key != "arrival_time"}


@pytest.mark.parametrize(
    ("messages", "template_kwargs"),
    [
        (chat("Hi"), {}),
        (chat("Hi", "Ö 你好 \N{GRINNING FACE} \x00", name="me"), {"enable_thinking": False}),
        ([{"role": "developer", "content": "Be brief."}, *chat("x" * 1000)], {"builtin": "a"}),
        (chat(*["x"] * MOST_MESSAGES), {}),
        (chat("1" * 1900), {}),
        (chat("Hi"), {"tools": [TOOL], "documents": [], "effort": 0.5}),
        ([{"role": "assistant", "content": None, "tool_calls": [CALL]}, *chat("Hi")], {"tools": [TOOL, TOOL]}),
    ],
)
async def test_a_short_chat_is_rendered_at_once(
    ours: Ours, theirs: Any, messages: list[dict[str, Any]], template_kwargs: dict[str, Any]
) -> None:
    conversations, (prompt,) = await ours.render_chat_async(*asked(messages, **template_kwargs))
    assert ours.jobs == 0
    expected, (reference,) = await theirs.render_chat_async(*asked(messages, **template_kwargs))
    assert ours.jobs == 2
    assert conversations == expected
    assert tokens(prompt) == tokens(reference)


@pytest.mark.parametrize(
    ("messages", "template_kwargs"),
    [
        (chat("x" * (MOST_CHARACTERS + 1)), {}),
        (chat("x" * (MOST_CHARACTERS // 2), "x" * (MOST_CHARACTERS // 2 + 1)), {}),
        (chat("Hi"), {"builtin": "x" * MOST_CHARACTERS}),
        (chat("\N{CJK UNIFIED IDEOGRAPH-4F60}" * 700), {}),
        (chat("Hi"), {"times": 10**6}),
        (chat("Hi"), {"x" * MOST_CHARACTERS: ""}),
        (chat("Hi"), {f"_{number}": "" for number in range(MOST_VARIABLES)}),
        (chat("Hi"), {"tools": [TOOL] * 20}),
        (chat("Hi"), {"tools": [{**TOOL, "description": "x" * MOST_CHARACTERS}]}),
        (chat("Hi"), {"tools": [{**TOOL, "minimum": 10**400}]}),
        (chat("Hi"), {"nested": [{"times": [-(10**6)]}]}),
        (chat("Hi"), {"times": float("nan")}),
        (chat("Hi"), {"empty": [[]] * (MOST_CHARACTERS + 1)}),
        (chat("Hi"), {"other": {"Hi"}}),
        (chat([{"type": "text", "text": "Hi"}]), {}),
        ([{"role": "assistant", "content": "", "tool_calls": [CALL] * 50}], {}),
        (chat(*["x"] * (MOST_MESSAGES + 1)), {}),
    ],
)
async def test_what_may_take_long_is_rendered_in_the_thread(
    ours: Ours, theirs: Any, messages: list[dict[str, Any]], template_kwargs: dict[str, Any]
) -> None:
    _, (prompt,) = await ours.render_chat_async(*asked(messages, **template_kwargs))
    assert ours.jobs == 2
    _, (reference,) = await theirs.render_chat_async(*asked(messages, **template_kwargs))
    assert tokens(prompt) == tokens(reference)


async def test_a_short_chat_does_not_wait_for_a_long_one(ours: Ours, theirs: Any) -> None:
    may_end = threading.Event()
    work = asyncio.get_running_loop().run_in_executor(theirs._executor, may_end.wait)
    try:
        async with asyncio.timeout(5):
            await ours.render_chat_async(*asked(chat("Hi")))
        assert not work.done()
    finally:
        may_end.set()
        await work


async def test_what_took_long_is_for_the_thread_for_a_while(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_SECONDS", MOST_SECONDS)
    counting = "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}{{ messages }}"
    slow = ChatParams(chat_template=counting, chat_template_kwargs=TEMPLATE_KWARGS)
    await ours.render_chat_async([chat("Hi")], slow, LIMITS)
    assert ours.jobs == 0
    await ours.render_chat_async(*asked(chat("Hi")))
    assert ours.jobs == 2
    await ours.render_cmpl_async([{"prompt": "Hi"}], LIMITS)
    assert ours.jobs == 3
    monkeypatch.setattr(rendering, "MOST_SECONDS", 60.0)
    later = time.monotonic() + REST_SECONDS
    monkeypatch.setattr(rendering, "time", SimpleNamespace(monotonic=lambda: later, thread_time=time.thread_time))
    await ours.render_chat_async(*asked(chat("Hi")))
    assert ours.jobs == 3


async def test_requests_of_the_wire_are_rendered_at_once(ours: Ours, theirs: Any) -> None:
    """By those who ask it, with all that they and vLLM's parts ask it with."""
    config = theirs.model_config
    llm = SimpleNamespace(renderer=theirs, model_config=config, get_tokenizer=theirs.get_tokenizer)
    adapters = Adapters(NO_ADAPTERS)
    generator = Generator(cast("Any", llm), ParserChoice(None, None, "as asked"), adapters)
    metadata = {"enable_thinking": "false", "reasoning_effort": "low", "cache_salt": "salt"}
    asking = pb.PredictOptions(
        UseTokenizerTemplate=True, Messages=[pb.Message(role="user", content="Hi")], Metadata=metadata
    )
    for options in (asking, pb.PredictOptions(Prompt="Hi", Metadata=metadata)):
        rendered = await generator.render(generation_request(options, stream=True, has_tool_parser=False))
        assert rendered["cache_salt"] == "salt"
    pooler = SimpleNamespace(max_embed_len=None, enable_chunked_processing=False)
    with mock.patch.object(config, "pooler_config", pooler):
        engine = SimpleNamespace(llm=llm, abilities=SimpleNamespace(pooling="embed"))
        embedder = Embedder(cast("Any", engine), adapters)
        request = embedding_request(pb.PredictOptions(Embeddings="Hi", Metadata={"cache_salt": "salt"}), config)
        assert (await embedder._render(request))["cache_salt"] == "salt"
    assert ours.jobs == 0


async def test_what_a_template_refuses_is_refused_alike(ours: Ours, theirs: Any) -> None:
    strict = ChatParams(chat_template="{{ raise_exception('no') }}", chat_template_kwargs=TEMPLATE_KWARGS)
    with pytest.raises(Exception, match="no") as mine:
        await ours.render_chat_async([chat("Hi")], strict, LIMITS)
    assert ours.jobs == 0
    with pytest.raises(type(mine.value)) as its:
        await theirs.render_chat_async([chat("Hi")], strict, LIMITS)
    assert str(mine.value) == str(its.value)


@pytest.mark.parametrize(
    ("prompt", "jobs"),
    [
        ({"prompt": "Hi"}, 0),
        ({"prompt": "x" * MOST_CHARACTERS}, 0),
        ({"prompt": "x" * (MOST_CHARACTERS + 1)}, 1),
        ({"prompt": "Hi", "cache_salt": "s"}, 1),
    ],
)
async def test_texts(ours: Ours, theirs: Any, prompt: dict[str, Any], jobs: int) -> None:
    (made,) = await ours.render_cmpl_async([dict(prompt)], LIMITS)
    assert ours.jobs == jobs
    (reference,) = await theirs.render_cmpl_async([dict(prompt)], LIMITS)
    assert tokens(made) == tokens(reference)


async def test_renderers_of_other_kinds_do_as_they_do() -> None:
    """They are Python all through, as Mistral's is."""

    async def render(*_: Any) -> tuple[list[Any], list[Any]]:
        return [], ["its own way"]

    other = SimpleNamespace(render_chat_async=render)
    assert await Renderer(cast("Any", other)).render_chat_async(*asked(chat("Hi"))) == ([], ["its own way"])
