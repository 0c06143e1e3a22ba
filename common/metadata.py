"""ModelMetadata: what a client would want to know of the loaded model, computed from its template and its parsers."""

import logging
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from common.generator import Generator
from common.media import MARKER
from common.pb import backend_pb2 as pb
from common.tokens import rendered_chat
from common.tool_format import conversation, tool_format

logger = logging.getLogger(__name__)

_SAMPLE = [{"role": "user", "content": "Hello!"}]
# The variables by which templates switch thinking; vLLM passes on those that a template reads.
_SWITCHES = ("enable_thinking", "thinking")
_MARKED = ("image", "audio")


async def model_metadata(generator: Generator | None, _options: pb.ModelOptions) -> pb.ModelMetadataResponse:
    """Of the model that is loaded; all unset for one that generates no text. The options are not read."""
    if generator is None:
        return pb.ModelMetadataResponse()
    thinking, plain = [await _prompt(generator, _SAMPLE, thinking=on) for on in (True, False)]
    reasoning = _reasoning_markers(generator)
    calls = [await _prompt(generator, conversation(number)) for number in range(3)]
    return pb.ModelMetadataResponse(
        supports_thinking=bool(reasoning) or thinking != plain,
        rendered_template=thinking,
        tool_format=pb.ToolFormatMarkers(**found) if (found := tool_format(*calls) | reasoning) else None,
        media_marker=_media_marker(generator),
    )


async def _prompt(generator: Generator, messages: Sequence[Any], *, thinking: bool = True) -> str:
    """What the template makes of a chat, without the beginning of another answer if there is one; "" if it refuses."""
    ends = messages[-1]["role"] == "assistant"
    try:
        chat = ChatCompletionRequest(
            messages=messages,
            add_generation_prompt=not ends,
            chat_template_kwargs=dict.fromkeys(_SWITCHES, thinking),
        )
        prompt = await rendered_chat(generator.llm.renderer, chat)
        if "prompt" in prompt:
            return str(prompt["prompt"])
        return str(await generator.llm.renderer._async_tokenizer_decode(prompt["prompt_token_ids"]))
    except Exception as error:  # noqa: BLE001  # whatever a foreign template raises, it shows nothing
        logger.debug("metadata: the chat template refuses a sample: %s", type(error).__name__)
        return ""


def _reasoning_markers(generator: Generator) -> dict[str, str]:
    """Those that the reasoning parser looks for; empty without one."""
    parser_class = generator.parser_class
    if parser_class is None:
        return {}
    parser = parser_class(generator.llm.get_tokenizer(), model_config=generator.model_config).reasoning_parser
    if parser is None:
        return {}
    return {"reasoning_start": parser.reasoning_start_str or "", "reasoning_end": parser.reasoning_end_str or ""}


def _media_marker(generator: Generator) -> str:
    renderer = generator.llm.renderer
    if renderer.mm_processor is None:
        return ""
    limits = renderer.get_mm_processor().info.allowed_mm_limits
    return MARKER if any(limits.get(modality) != 0 for modality in _MARKED if modality in limits) else ""
