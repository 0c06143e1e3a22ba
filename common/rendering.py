"""vLLM's renderer, which leaves rendering and tokenizing to a thread; here short prompts are done where they come in.

Of some hundred characters the event loop has made a prompt in 0.2 ms. To wake the thread and to be woken by it, once to
render and once to tokenize, takes longer than that on a machine with little else to do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from vllm.renderers.base import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams

# Of a prompt that is made at once: 1 ms where a character is a token.
MOST_CHARACTERS = 2000
MOST_MESSAGES = 16
# A template that makes more of so few characters says much itself, each time.
MOST_TOKENS = 1000


class Renderer:
    """What vLLM's parts take for a `BaseRenderer`: the one given, but for how it renders what is short.

    Not at once is anything that may take long all the same: tools, media, and numbers or lists that a template could
    count by. Nor while the renderer's thread is at work: it has the tokenizer then, which vLLM would copy for another
    thread, and that takes tenths of a second.
    """

    def __init__(self, renderer: BaseRenderer[Any]) -> None:
        self._renderer = renderer
        # Others render and tokenize in Python, which takes its time, or have no thread.
        self._is_apt = isinstance(renderer, HfRenderer)
        self._working: set[Future[Any]] = set()
        if self._is_apt:
            executor = renderer._executor
            executor.submit = self._watched(executor.submit)

    def __getattr__(self, name: str) -> Any:
        """Whatever else vLLM wants of it."""
        return getattr(self._renderer, name)

    async def render_chat_async(
        self, conversations: Sequence[list[Any]], chat_params: ChatParams, *args: Any, **kwargs: Any
    ) -> Any:
        """See `BaseRenderer`."""
        if not self._may(_chat_length(conversations, chat_params.chat_template_kwargs)):
            return await self._renderer.render_chat_async(conversations, chat_params, *args, **kwargs)
        done = self._renderer.render_chat(conversations, chat_params, *args, **kwargs)
        self._heed(done[1])
        return done

    async def render_cmpl_async(self, prompts: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """See `BaseRenderer`."""
        if not self._may(_text_length(prompts)):
            return await self._renderer.render_cmpl_async(prompts, *args, **kwargs)
        return self._renderer.render_cmpl(prompts, *args, **kwargs)

    def _may(self, length: int | None) -> bool:
        return self._is_apt and length is not None and length <= MOST_CHARACTERS and not self._working

    def _heed(self, prompts: Iterable[Any]) -> None:
        if any(len(prompt["prompt_token_ids"]) > MOST_TOKENS for prompt in prompts):
            self._is_apt = False

    def _watched(self, submit: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
        def watched(*args: Any, **kwargs: Any) -> Future[Any]:
            future = submit(*args, **kwargs)
            self._working.add(future)
            future.add_done_callback(self._working.discard)
            return future

        return watched


def _chat_length(conversations: Sequence[Sequence[Any]], template_kwargs: Mapping[str, Any]) -> int | None:
    """Characters of all messages and of what the template is told; None where it is not for them to say."""
    messages = [message for conversation in conversations for message in conversation]
    if len(messages) > MOST_MESSAGES:
        return None
    length = 0
    for value in (*template_kwargs.values(), *(value for message in messages for value in message.values())):
        if isinstance(value, str):
            length += len(value)
        elif value is not None and not isinstance(value, bool):
            return None
    return length


def _text_length(prompts: Sequence[Any]) -> int | None:
    """Characters of prompts that are nothing but texts; None where one is not."""
    length = 0
    for prompt in prompts:
        if not isinstance(prompt, dict) or prompt.keys() != {"prompt"} or not isinstance(prompt["prompt"], str):
            return None
        length += len(prompt["prompt"])
    return length
