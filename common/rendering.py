"""vLLM's renderer, which leaves rendering and tokenizing to a thread; here short prompts are done where they come in.

Of some hundred characters the event loop has made a prompt in 0.2 ms. To wake the thread and to be woken by it, once to
render and once to tokenize, takes longer than that on a machine with little else to do; and what the thread has before
it may be a hundred thousand tokens.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams

# Of a prompt that is made at once: 1 ms where each is a token. One that is not of ASCII may be three.
MOST_CHARACTERS = 2000
_TOKENS_OF_OTHERS = 3
MOST_MESSAGES = 16
MOST_VARIABLES = 32
# Of the processor. After one that took longer, be it by what the template itself says, the thread has all for a while.
MOST_SECONDS = 0.005
REST_SECONDS = 60.0


class Renderer:
    """What vLLM's parts take for a `BaseRenderer`: the one given, but for how it renders what is short.

    The thread, where vLLM ends what takes 30 s, has all that a caller could make long in other ways: media, and numbers
    that a template could count by.
    """

    def __init__(self, renderer: BaseRenderer[Any]) -> None:
        self._renderer = renderer
        # Others render or tokenize in Python. Of a fast tokenizer vLLM has one copy more than threads.
        self._is_apt = isinstance(renderer, HfRenderer) and bool(getattr(renderer.tokenizer, "is_fast", False))
        self._rests_until = 0.0

    def __getattr__(self, name: str) -> Any:
        """Whatever else vLLM wants of it."""
        return getattr(self._renderer, name)

    async def render_chat_async(
        self, conversations: Sequence[list[Any]], chat_params: ChatParams, *args: Any, **kwargs: Any
    ) -> Any:
        """See `BaseRenderer`."""
        if not self._may(_chat_length(conversations, chat_params.chat_template_kwargs)):
            return await self._renderer.render_chat_async(conversations, chat_params, *args, **kwargs)
        with self._timed():
            return self._renderer.render_chat(conversations, chat_params, *args, **kwargs)

    async def render_cmpl_async(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """See `BaseRenderer`."""
        if not self._may(_text_length(prompts)):
            return await self._renderer.render_cmpl_async(prompts, *args, **kwargs)
        with self._timed():
            return self._renderer.render_cmpl(prompts, *args, **kwargs)

    def _may(self, length: float | None) -> bool:
        return (
            self._is_apt and length is not None and length <= MOST_CHARACTERS and time.monotonic() >= self._rests_until
        )

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.thread_time()
        try:
            yield
        finally:
            if time.thread_time() - started > MOST_SECONDS:
                self._rests_until = time.monotonic() + REST_SECONDS


def _chat_length(conversations: Sequence[Sequence[Any]], variables: Mapping[str, Any]) -> float | None:
    """Characters of all messages and of the template's variables; None where it is not for them to say."""
    messages = [message for conversation in conversations for message in conversation]
    if len(messages) > MOST_MESSAGES or len(variables) > MOST_VARIABLES:
        return None
    if not all(isinstance(message.get("content"), str | None) for message in messages):
        return None
    return _nested_length([*variables, *variables.values(), *(value for each in messages for value in each.values())])


def _nested_length(values: list[Any]) -> float | None:
    """Of tools and calls, too: what a template could count by, whichever part of them it takes.

    Not all is looked at where it is more than `MOST_CHARACTERS`.
    """
    length = 0.0
    while values and length <= MOST_CHARACTERS:
        value = values.pop()
        if isinstance(value, str):
            length += _length(value)
        elif isinstance(value, bool) or value is None:
            length += 1
        elif isinstance(value, int | float):
            length += min(MOST_CHARACTERS + 1, abs(value))  # which may be no number, or none that a float can be
        elif isinstance(value, Mapping | list | tuple):
            length += len(value)
            if length <= MOST_CHARACTERS:
                values += value
                values += value.values() if isinstance(value, Mapping) else ()
        else:
            return None
    return length


def _text_length(prompts: Sequence[Any]) -> int | None:
    """Characters of prompts that are nothing but texts; None where one is not."""
    length = 0
    for prompt in prompts:
        if not isinstance(prompt, dict) or prompt.keys() != {"prompt"} or not isinstance(prompt["prompt"], str):
            return None
        length += _length(prompt["prompt"])
    return length


def _length(text: str) -> int:
    return len(text) if text.isascii() else len(text) * _TOKENS_OF_OTHERS
