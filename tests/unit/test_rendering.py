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
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.params import ChatParams, TokenizeParams

from common import rendering
from common.rendering import MOST_CHARACTERS, MOST_MESSAGES, MOST_VARIABLES, REST_SECONDS, Renderer
from tests.models import ensure

LIMITS = TokenizeParams(max_total_tokens=None)
# As vLLM asks for a chat's text.
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
def ours(theirs: Any) -> Iterator[Ours]:
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
        (chat("Hi"), {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        (chat([{"type": "text", "text": "Hi"}]), {}),
        ([{"role": "assistant", "content": "", "tool_calls": []}], {}),
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
    counting = "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}{{ messages }}"
    slow = ChatParams(chat_template=counting, chat_template_kwargs=TEMPLATE_KWARGS)
    await ours.render_chat_async([chat("Hi")], slow, LIMITS)
    assert ours.jobs == 0
    await ours.render_chat_async(*asked(chat("Hi")))
    assert ours.jobs == 2
    await ours.render_cmpl_async([{"prompt": "Hi"}], LIMITS)
    assert ours.jobs == 3
    later = time.monotonic() + REST_SECONDS
    monkeypatch.setattr(rendering, "time", SimpleNamespace(monotonic=lambda: later, thread_time=time.thread_time))
    await ours.render_chat_async(*asked(chat("Hi")))
    assert ours.jobs == 3


async def test_through_vllm_s_parts(ours: Ours, theirs: Any) -> None:
    """Those that ask it in the end, with all that they ask it with."""
    online = OnlineRenderer(
        theirs.model_config,
        cast("Any", ours),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    online.warmup()
    request = ChatCompletionRequest(
        messages=[{"role": "user", "content": "Hi"}],
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
        cache_salt="salt",
    )
    rendered: Any = await online.render_chat(request)
    assert rendered[1][0]["cache_salt"] == "salt"
    (completion,) = cast("Any", await online.render_completion(CompletionRequest(prompt="Hi", cache_salt="salt")))
    assert completion["cache_salt"] == "salt"
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
