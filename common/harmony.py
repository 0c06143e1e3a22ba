"""gpt-oss' chats: vLLM renders them itself, with openai_harmony, in the event loop and however long they are.

openai_harmony holds Python's lock meanwhile, and takes time with the square of a run of letters, signs or blanks: 0.7 s
for 40,000 letters, where as many characters of a text take a hundredth of that.
"""

import asyncio
import json
from typing import Any

import regex
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.online_renderer import OnlineRenderer

from common.concurrency import in_thread
from common.errors import InvalidRequest
from common.json_values import contents
from common.tokens import MOST_CHARACTERS

# What its vocabulary splits no further: letters with their marks, signs with line breaks behind them, and blanks.
_RUN = regex.compile(r"[\p{L}\p{M}]++|[^\s\p{L}\p{N}]++[\r\n/]*+|\s++")
# Of bytes in all runs, squared: one of so many bytes, or four of half as many.
MOST_RUN_BYTES = 50_000


async def render_chat(renderer: OnlineRenderer, chat: ChatCompletionRequest) -> Any:
    """As `OnlineRenderer.render_chat`, in a thread.

    Raises:
        InvalidRequest: it would hold up all other requests.

    """
    return await in_thread(_rendered, renderer, chat)


def _rendered(renderer: OnlineRenderer, chat: ChatCompletionRequest) -> Any:
    check(chat)
    # Its coroutine waits for nothing.
    return asyncio.run(renderer.render_chat(chat))


def check(chat: ChatCompletionRequest) -> None:
    """Refuse a chat that openai_harmony takes long for.

    Raises:
        InvalidRequest: more than `tokens.MOST_CHARACTERS`, or runs longer than `MOST_RUN_BYTES`.

    """
    field = "Messages, Tools" if chat.tools else "Messages"
    tools = [tool.model_dump() for tool in chat.tools or ()]
    size = cost = longest = 0
    # Of a schema it writes some values as JSON.
    texts = (each for each in contents([chat.messages, tools]) if isinstance(each, str))
    for text in (*texts, json.dumps(tools, ensure_ascii=False, separators=(",", ":"))):
        size += len(text)
        if size > MOST_CHARACTERS:
            raise InvalidRequest(field, f"more characters than {MOST_CHARACTERS}; use at most so many")
        for run in _RUN.finditer(text):
            length = len(run[0].encode())
            longest, cost = max(longest, length), cost + length * length
    if cost > MOST_RUN_BYTES**2:
        raise InvalidRequest(
            field,
            f"{longest} bytes of letters, signs or blanks without a break take gpt-oss' tokenizer too long; use at most"
            f" {MOST_RUN_BYTES}, fewer where there are several such runs",
        )
