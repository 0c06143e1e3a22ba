"""Which prompts are made at once and which in the thread of vLLM's renderer; and that they are the same."""

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm import AsyncEngineArgs
from vllm.renderers import renderer_from_config
from vllm.renderers.params import ChatParams, TokenizeParams

from common.rendering import MOST_CHARACTERS, MOST_MESSAGES, MOST_TOKENS, Renderer
from tests.models import ensure

LIMITS = TokenizeParams(max_total_tokens=None)
# As vLLM asks for a chat's text.
TEMPLATE_KWARGS = {"tools": None, "tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
WORD = "word "


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
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
        (chat("Hi"), {"times": 10**6}),
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


async def test_a_thread_at_work_has_the_tokenizer(ours: Ours, theirs: Any) -> None:
    may_end = threading.Event()
    work = asyncio.get_running_loop().run_in_executor(theirs._executor, may_end.wait)
    short = asyncio.create_task(ours.render_chat_async(*asked(chat("Hi"))))
    try:
        done, _ = await asyncio.wait([short], timeout=0.2)
        assert not done
        assert ours.jobs == 2
    finally:
        may_end.set()
        await asyncio.gather(work, short)
    assert ours.jobs == 3
    await ours.render_chat_async(*asked(chat("Hi")))
    assert ours.jobs == 3


async def test_a_template_that_says_much(ours: Ours) -> None:
    wordy = ChatParams(chat_template=WORD * MOST_TOKENS + "{{ messages }}", chat_template_kwargs=TEMPLATE_KWARGS)
    _, (prompt,) = await ours.render_chat_async([chat("Hi")], wordy, LIMITS)
    assert len(prompt["prompt_token_ids"]) > MOST_TOKENS
    assert ours.jobs == 0
    await ours.render_chat_async([chat("Hi")], wordy, LIMITS)
    assert ours.jobs == 2


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
        ({"prompt_token_ids": [1, 2]}, 0),
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
