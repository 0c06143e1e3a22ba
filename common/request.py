"""`PredictOptions` -> the OpenAI request that vLLM's renderer and parsers take: every quirk of the wire ends here."""

import dataclasses
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError

from common import known_settings
from common.errors import InvalidRequest
from common.grammar import structured_outputs
from common.media import Item, media_items, place
from common.messages import openai_messages
from common.pb import backend_pb2 as pb
from common.request_metadata import rank, reasoning_effort, switch, template_kwargs
from common.sampling import sampling_fields
from common.tools import openai_tool_choice, openai_tools
from common.wire_names import from_pydantic, from_vllm

R = TypeVar("R", ChatCompletionRequest, CompletionRequest)

MAX_REQUEST_ID = 256
# A grammar or schema is compiled once more in the event loop, at about 2 MB/s.
MOST_JSON = 512 * 1024
# What takes longer than a switch to a thread.
_LONG = 64 * 1024
_MANY_MESSAGES = 200


@dataclasses.dataclass(frozen=True)
class GenerationRequest:
    """One Predict or PredictStream, understood."""

    openai: ChatCompletionRequest | CompletionRequest
    """A chat to render by the model's template, or a raw prompt."""
    request_id: str
    """As it stands in the log; not necessarily unique."""
    max_tokens: int | None
    """Most tokens to generate; None fills the context. Never more than the context has left."""
    top_logprobs: int | None
    """Alternatives per token; None where no log-probabilities are asked for."""
    adapter: str = ""
    """The LoRA adapter's name; empty for the model's default."""
    one_call: bool = False
    """Whether calls after the first are left out, as the caller wants none in parallel."""
    media: tuple[Item, ...] = ()
    """All images, videos and audio clips; a chat has them in its messages, a raw prompt does not."""
    rank: int | None = None
    """The data-parallel rank that is to answer; None: the one with the least to do."""

    @property
    def is_chat(self) -> bool:
        """Whether tools and reasoning are parsed out of the answer; a raw prompt's answer is text."""
        return isinstance(self.openai, ChatCompletionRequest)

    @property
    def has_tools(self) -> bool:
        """Whether the model may, or must, call tools."""
        return isinstance(self.openai, ChatCompletionRequest) and bool(self.openai.tools)

    @property
    def prompt_field(self) -> str:
        """The wire's field that holds the prompt."""
        return "Messages" if self.is_chat else "Prompt"


def generation_request(
    options: pb.PredictOptions,
    *,
    stream: bool,
    has_tool_parser: bool,
    max_logprobs: int = 20,
    ignore_seed: bool = False,
    ranks: int = 1,
) -> GenerationRequest:
    """Understand `options`, for a model with or without a tool parser, on so many data-parallel ranks.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.
        Unsupported: the request asks for what this server doesn't do.

    """
    for field, text in (
        ("Grammar", options.Grammar),
        *((f'Metadata["{key}"]', options.Metadata.get(key, "")) for key in ("json_schema", "response_format")),
    ):
        _check_size(field, text)
    media = media_items(options)
    fields = sampling_fields(options, max_logprobs=max_logprobs)
    if ignore_seed:
        fields["seed"] = None
    fields |= structured_outputs(options.Grammar, options.Metadata)
    fields["stream"] = stream
    top_logprobs = fields.pop("top_logprobs", None)
    stop = fields.pop("stop")
    fields["request_id"] = request_id = request_id_of(options.CorrelationId)
    if salt := options.Metadata.get("cache_salt", ""):
        fields["cache_salt"] = salt
    openai: ChatCompletionRequest | CompletionRequest
    if is_chat(options):
        if top_logprobs is not None:
            fields |= {"logprobs": True, "top_logprobs": top_logprobs}
        openai = chat_request(options, media, has_tool_parser=has_tool_parser, fields=fields)
    else:
        fields |= {"prompt": _raw_prompt(options), "logprobs": top_logprobs, "max_tokens": None}
        openai = _checked(CompletionRequest, fields)
    # OpenAI takes four strings and its model refuses more; vLLM's sampling takes any number.
    openai.stop = stop
    max_tokens = options.Tokens if options.Tokens > 0 else None
    adapter = options.Metadata.get("lora", "")
    one_call = isinstance(openai, ChatCompletionRequest) and openai.parallel_tool_calls is False
    pinned = rank(options, ranks)
    return GenerationRequest(openai, request_id, max_tokens, top_logprobs, adapter, one_call, media, pinned)


def is_chat(options: pb.PredictOptions) -> bool:
    """Whether `Messages` are to be rendered, not `Prompt` read as it is."""
    return options.UseTokenizerTemplate and bool(options.Messages)


def chat_request(
    options: pb.PredictOptions, media: Sequence[Item], *, has_tool_parser: bool, fields: Mapping[str, Any] | None = None
) -> ChatCompletionRequest:
    """The chat with its `media`; `fields`, OpenAI's, say how it is answered.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.

    """
    chat = _chat_fields(options, has_tool_parser=has_tool_parser)
    place(chat["messages"], media)
    return _checked(known_settings.chat_request, {**(fields or {}), **chat})


def is_heavy(options: pb.PredictOptions) -> bool:
    """Whether understanding takes long enough to hold up others.

    A large grammar takes seconds, 20,000 messages 0.2 s, an image of 35 MB 0.1 s.
    """
    return bool(
        len(options.Messages) > _MANY_MESSAGES
        or options.Grammar
        or options.Images
        or options.Videos
        or options.Audios
        or any(key in options.Metadata for key in ("json_schema", "response_format"))
        or len(options.Tools) + len(options.ToolChoice) + len(options.LogitBias) > _LONG
        or len(options.Metadata.get("chat_template_kwargs", "")) > _LONG
        or sum(len(message.tool_calls) for message in options.Messages) > _LONG
    )


def _checked(model: Callable[..., R], fields: Mapping[str, Any]) -> R:
    """A request of vLLM, which checks its `fields`."""
    try:
        return model(**fields)
    except pydantic.ValidationError as error:
        raise from_pydantic(error) from None
    except VLLMValidationError as error:
        raise from_vllm(error) from None


def _check_size(field: str, text: str) -> None:
    if len(text) > MOST_JSON:
        raise InvalidRequest(field, f"has {len(text)} characters; use at most {MOST_JSON}")


def request_id_of(given: str) -> str:
    """The caller's `CorrelationId`, or one of our own.

    Raises:
        InvalidRequest: it would not fit into a log line.

    """
    if len(given) > MAX_REQUEST_ID or not given.isprintable():
        raise InvalidRequest("CorrelationId", f"must be printable and have at most {MAX_REQUEST_ID} characters")
    return given or uuid.uuid4().hex


def _raw_prompt(options: pb.PredictOptions) -> str:
    if not options.Prompt:
        empty = "Prompt is empty, and no Messages are given" if options.UseTokenizerTemplate else "is empty"
        raise InvalidRequest("Prompt", empty)
    return str(options.Prompt)


def _chat_fields(options: pb.PredictOptions, *, has_tool_parser: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {"messages": openai_messages(options.Messages)}
    _check_size("Tools", options.Tools)
    tools = openai_tools(options.Tools)
    choice, parallel = openai_tool_choice(options.ToolChoice, tools)
    if tools and choice != "none":
        if not has_tool_parser and choice != "auto":
            raise InvalidRequest(
                "ToolChoice", "only auto and none work for a model that was loaded without tool_parser"
            )
        # Without a parser the template still shows the tools, and the caller finds the calls in the text.
        fields |= {"tools": tools, "tool_choice": choice if has_tool_parser else "none"}
        if not parallel:
            fields["parallel_tool_calls"] = False
    elif not tools and choice not in ("auto", "none"):
        raise InvalidRequest("ToolChoice", f"{options.ToolChoice} needs Tools, and there are none")
    kwargs = template_kwargs(options)
    if effort := reasoning_effort(options):
        fields["reasoning_effort"] = effort
        kwargs.pop("reasoning_effort", None)
        if "enable_thinking" not in kwargs:
            # As vLLM does for `enable_thinking` itself.
            kwargs.setdefault("thinking", effort != "none")
    if switch(options, "continue_final_message"):
        if options.Messages[-1].role != "assistant":
            raise InvalidRequest(
                'Metadata["continue_final_message"]', "needs an assistant's message at the end of Messages"
            )
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    kwargs.pop("continue_final_message", None)
    if kwargs:
        fields["chat_template_kwargs"] = kwargs
    return fields
