"""Text -> token ids and back, by the tokenizer and the template that generation uses."""

import asyncio
from collections.abc import Sequence
from typing import Any

from vllm.renderers.params import TokenizeParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.engine.async_llm import AsyncLLM

from common.errors import InvalidRequest
from common.media_prompt import named, raw_prompt
from common.mistral import prepare
from common.request import GenerationRequest
from common.vllm_errors import translated

# Beyond, the tokenizer takes seconds and gigabytes, and goes on when the caller has left.
MOST_CHARACTERS = 2_000_000
# As many ids for the way back, and for ids that are an input by themselves.
MOST_IDS = 2_000_000
# What takes longer to look through than a switch to a thread.
MANY_IDS = 16 * 1024


async def tokenize(llm: AsyncLLM, request: GenerationRequest) -> list[int]:
    """The ids of a request's prompt: the rendered chat, or the raw text with the special tokens its model adds.

    Texts longer than the context are fine: the orchestrator counts them in order to cut them.

    Raises:
        InvalidRequest: more than `MOST_CHARACTERS`, or a chat that the template refuses.

    """
    length = len(request.openai.prompt) if not request.is_chat else _characters(request.openai.messages)
    if length > MOST_CHARACTERS:
        raise InvalidRequest(request.prompt_field, f"has {length} characters; use at most {MOST_CHARACTERS}")
    renderer = llm.renderer
    with translated(request.prompt_field), named(request.media):
        if request.is_chat:
            prompt = await rendered_chat(renderer, request.openai)
        else:
            lower_case = (llm.model_config.encoder_config or {}).get("do_lower_case", False)
            limits = TokenizeParams(max_total_tokens=None, add_special_tokens=True, do_lower_case=lower_case)
            text: Any = {"prompt": request.openai.prompt}
            if request.media:
                text = await raw_prompt(request.openai.prompt, request.media, renderer)
            (prompt,) = await renderer.render_cmpl_async([text], limits, skip_mm_cache=True)
    return list(prompt["prompt_token_ids"])


async def rendered_chat(renderer: Any, chat: Any) -> Any:
    """The prompt of a `ChatCompletionRequest` of any length, as vLLM's inputs are: a dict with `prompt_token_ids`."""
    if is_mistral_tokenizer(renderer.tokenizer):
        prepare(chat)
    defaults = {
        "tools": [tool.model_dump() for tool in chat.tools] if chat.tools else None,
        "tokenize": is_mistral_tokenizer(renderer.tokenizer),
    }
    params = chat.build_chat_params(None, "auto").with_defaults(defaults)
    limits = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
    _, (prompt,) = await renderer.render_chat_async([chat.messages], params, limits, skip_mm_cache=True)
    return prompt


async def detokenize(llm: AsyncLLM, token_ids: Sequence[int]) -> str:
    """The text of `token_ids`, special tokens included.

    Raises:
        InvalidRequest: more than `MOST_IDS`, or an id outside the vocabulary.

    """
    field, size = "tokens", llm.model_config.get_vocab_size()
    with translated(field):
        if len(token_ids) > MANY_IDS:
            ids = await asyncio.to_thread(checked_ids, field, token_ids, size)
        else:
            ids = checked_ids(field, token_ids, size)
        # Runs in the renderer's pool; vLLM gives it no public name.
        return str(await llm.renderer._async_tokenizer_decode(ids))


def checked_ids(field: str, token_ids: Sequence[int], vocabulary: int) -> list[int]:
    """The ids that came in `field`.

    Raises:
        InvalidRequest: more than `MOST_IDS`, or an id outside a vocabulary of that size.

    """
    if len(token_ids) > MOST_IDS:
        raise InvalidRequest(field, f"has {len(token_ids)} ids; use at most {MOST_IDS}")
    ids = list(token_ids)
    if ids and (min(ids) < 0 or max(ids) >= vocabulary):
        index, wrong = next((index, number) for index, number in enumerate(ids) if not 0 <= number < vocabulary)
        raise InvalidRequest(f"{field}[{index}]", f"{wrong} is not a token id; use 0 to {vocabulary - 1}")
    return ids


def _characters(messages: Sequence[Any]) -> int:
    return sum(len(content) for message in messages if isinstance(content := message.get("content"), str))
