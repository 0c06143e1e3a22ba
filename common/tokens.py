"""Text -> token ids and back, by the tokenizer and the template that generation uses."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.inputs import TextPrompt
from vllm.renderers.params import TokenizeParams
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.engine.async_llm import AsyncLLM

from common.concurrency import in_thread
from common.errors import InvalidRequest
from common.json_values import contents
from common.media import Item, media_items
from common.media_prompt import named, raw_prompt
from common.mistral import prepare
from common.pb import backend_pb2 as pb
from common.request import chat_request, is_chat
from common.vllm_errors import translated

if TYPE_CHECKING:
    from common.generator import Generator

# Beyond, the tokenizer takes seconds and gigabytes, and goes on when the caller has left.
MOST_CHARACTERS = 2_000_000
# As many ids for the way back, and for ids that are an input by themselves.
MOST_IDS = 2_000_000
# And so much text: more is 50 MiB in many languages, which no message holds.
MOST_TEXT = 16_000_000
# What takes longer to look through than a switch to a thread.
MANY_IDS = 16 * 1024


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a request has the model read: a chat to render by the model's template, or a text as it is."""

    content: ChatCompletionRequest | str
    media: tuple[Item, ...] = ()
    """All of it; a chat has it in its messages, too."""

    @property
    def field(self) -> str:
        """The wire's field that holds it."""
        return "Prompt" if isinstance(self.content, str) else "Messages"


def prompt_of(options: pb.PredictOptions, *, has_tool_parser: bool) -> Prompt:
    """The prompt that generation would see, which may be empty here; fields that only shape the answer are not read.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.

    """
    media = media_items(options)
    if is_chat(options):
        return Prompt(chat_request(options, media, has_tool_parser=has_tool_parser), media)
    return Prompt(options.Prompt, media)


async def tokenize(llm: AsyncLLM, prompt: Prompt, generator: "Generator | None") -> list[int]:
    """The ids of a prompt: of the rendered chat, or of the raw text with the special tokens that its model adds.

    Texts longer than the context are fine: the orchestrator counts them in order to cut them.

    Args:
        llm: the engine.
        prompt: see `prompt_of`.
        generator: of a model that generates; None of any other.

    Raises:
        InvalidRequest: more than `MOST_CHARACTERS`, before or after rendering, or a chat that the template refuses.

    """
    content, renderer = prompt.content, llm.renderer
    harmony = generator if generator is not None and generator.renderer.use_harmony else None
    if isinstance(content, str):
        _check_text(prompt.field, content)
    elif harmony is None:  # which checks by itself
        # In a thread: there may be a million values.
        await in_thread(_check_chat, content)
    with translated(prompt.field), named(prompt.media):
        if isinstance(content, str):
            lower_case = (llm.model_config.encoder_config or {}).get("do_lower_case", False)
            limits = _Limits(max_total_tokens=None, add_special_tokens=True, do_lower_case=lower_case, field="Prompt")
            text: Any = {"prompt": content}
            if prompt.media:
                text = await raw_prompt(content, prompt.media, renderer)
            (rendered,) = await renderer.render_cmpl_async([text], limits, skip_mm_cache=True)
        elif harmony is not None:
            rendered = await harmony.engine_input(content, prompt.media)
        else:
            rendered = await rendered_chat(renderer, content)
    return list(rendered["prompt_token_ids"])


async def rendered_chat(renderer: Any, chat: Any) -> Any:
    """The prompt of a `ChatCompletionRequest`, also beyond the context, as vLLM's inputs are: with `prompt_token_ids`.

    Raises:
        InvalidRequest: the template makes more than `MOST_CHARACTERS` of it.

    """
    if is_mistral_tokenizer(renderer.tokenizer):
        prepare(chat)
    defaults = {
        "tools": [tool.model_dump() for tool in chat.tools] if chat.tools else None,
        "tokenize": is_mistral_tokenizer(renderer.tokenizer),
    }
    params = chat.build_chat_params(None, "auto").with_defaults(defaults)
    limits = _Limits(max_total_tokens=None, add_special_tokens=False, field="Messages")
    _, (prompt,) = await renderer.render_chat_async([chat.messages], params, limits, skip_mm_cache=True)
    return prompt


async def detokenize(llm: AsyncLLM, token_ids: Sequence[int]) -> str:
    """The text of `token_ids`, special tokens included.

    Raises:
        InvalidRequest: more than `MOST_IDS`, an id outside the vocabulary, or more than `MOST_TEXT` characters.

    """
    field, size = "tokens", llm.model_config.get_vocab_size()
    with translated(field):
        if len(token_ids) > MANY_IDS:
            ids = await in_thread(checked_ids, field, token_ids, size)
        else:
            ids = checked_ids(field, token_ids, size)
        # Runs in the renderer's pool; vLLM gives it no public name.
        text = str(await llm.renderer._async_tokenizer_decode(ids))
    if len(text) > MOST_TEXT:
        raise InvalidRequest(field, f"have a text of {len(text)} characters; use ids of at most {MOST_TEXT}")
    return text


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


@dataclasses.dataclass(frozen=True)
class _Limits(TokenizeParams):  # type: ignore[misc]  # vLLM is untyped
    """vLLM's, with our limit of a text, since it has none for one that may be longer than the context."""

    field: str = ""
    """The wire's name of what the text was made of."""

    def apply_pre_tokenization(self, tokenizer: Any, prompt: TextPrompt) -> TextPrompt:
        _check_text(self.field, prompt["prompt"], " when it is rendered")
        return super().apply_pre_tokenization(tokenizer, prompt)


def _check_text(field: str, text: str, where: str = "") -> None:
    if len(text) > MOST_CHARACTERS:
        raise InvalidRequest(field, f"has {len(text)} characters{where}; use at most {MOST_CHARACTERS}")


def _check_chat(chat: Any) -> None:
    """Refuse a chat that it would take long to render, or to tokenize where a renderer does both at once."""
    texts = [_without_media(message) for message in chat.messages]
    tools = [tool.model_dump() for tool in chat.tools or ()]
    if _too_large(texts + tools):
        field = "Messages, Tools" if tools else "Messages"
        raise InvalidRequest(field, f"more characters than {MOST_CHARACTERS}; use at most so many")


def _without_media(message: Any) -> Any:
    content = message.get("content")
    return message if isinstance(content, str) else {**message, "content": [part.get("text") for part in content or ()]}


def _too_large(value: Any) -> bool:
    """Whether the strings in it, its keys among them, have too many characters; any other value counts as one."""
    size = 0
    for each in contents(value):
        size += len(each) if isinstance(each, str) else 1
        if size > MOST_CHARACTERS:
            return True
    return False
