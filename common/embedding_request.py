"""`PredictOptions` -> the OpenAI request that vLLM embeds."""

import dataclasses
from typing import Any

import pydantic
from vllm.config import ModelConfig
from vllm.entrypoints.pooling.embed.protocol import EmbeddingChatRequest, EmbeddingCompletionRequest
from vllm.exceptions import VLLMValidationError

from common import request
from common.errors import InvalidRequest
from common.media import Item, fields_of, media_items, place
from common.messages import openai_messages
from common.pb import backend_pb2 as pb
from common.request import request_id_of
from common.request_metadata import RANK, one_of, switch, template_kwargs, whole_number
from common.tokens import MANY_IDS, MOST_CHARACTERS, checked_ids
from common.wire_names import from_pydantic, from_vllm

TRUNCATE = "truncate_prompt_tokens"


@dataclasses.dataclass(frozen=True)
class EmbeddingRequest:
    """One Embedding, understood."""

    openai: EmbeddingCompletionRequest | EmbeddingChatRequest
    """Text or token ids as they are, or a chat to render by the model's template."""
    field: str
    """The wire's field that holds the input."""
    request_id: str
    """As it stands in the log; not necessarily unique."""
    adapter: str = ""
    """The LoRA adapter's name; empty for the model's default."""
    media: tuple[Item, ...] = ()
    """What is embedded with the text, or instead of it; a chat has it in its messages."""


def embedding_request(options: pb.PredictOptions, config: ModelConfig) -> EmbeddingRequest:
    """Understand `options` for a model that pools.

    The input is `Embeddings`; where that is empty, `EmbeddingTokens`; where both are, `Messages` with
    `UseTokenizerTemplate`. Images and other media belong to any but token ids, and are an input by themselves.

    Raises:
        InvalidRequest: names the field, the value and what is allowed.

    """
    media = media_items(options)
    if options.Metadata.get(RANK):
        raise InvalidRequest(f'Metadata["{RANK}"]', "vLLM pins no embedding to a rank; leave it out")
    fields: dict[str, Any] = {
        TRUNCATE: _truncation(options, config),
        "truncation_side": one_of(options, "truncation_side", "left", "right"),
        # Models of a fixed length, such as SigLIP, were trained so.
        "padding": one_of(options, "padding", "max_length", "do_not_pad"),
        "dimensions": whole_number(options, "dimensions"),
        "use_activation": switch(options, "use_activation"),
        "cache_salt": options.Metadata.get("cache_salt") or None,
    }
    request_id = request_id_of(options.CorrelationId)
    adapter = options.Metadata.get("lora", "")
    try:
        if not options.Embeddings and options.EmbeddingTokens:
            if media:
                raise InvalidRequest(fields_of(media), "can't be embedded with EmbeddingTokens; use Embeddings")
            ids = _token_ids(options, config, truncated=fields[TRUNCATE] is not None)
            openai = EmbeddingCompletionRequest(input=ids, **fields)
            return EmbeddingRequest(openai, "EmbeddingTokens", request_id, adapter)
        if not options.Embeddings and options.UseTokenizerTemplate and options.Messages:
            messages = openai_messages(options.Messages)
            _check_length("Messages", sum(map(_length, options.Messages)))
            place(messages, media)
            chat = EmbeddingChatRequest(messages=messages, chat_template_kwargs=template_kwargs(options), **fields)
            return EmbeddingRequest(chat, "Messages", request_id, adapter, media)
        if not options.Embeddings and not media:
            raise InvalidRequest("Embeddings", "is empty, and so is EmbeddingTokens; one of them is the input")
        _check_length("Embeddings", len(options.Embeddings))
        openai = EmbeddingCompletionRequest(input=options.Embeddings, **fields)
        return EmbeddingRequest(openai, "Embeddings", request_id, adapter, media)
    except pydantic.ValidationError as error:
        raise from_pydantic(error) from None
    except VLLMValidationError as error:
        raise from_vllm(error, "Embeddings") from None


def is_heavy(options: pb.PredictOptions) -> bool:
    """Whether understanding takes long enough to hold up others, as in generation; ids are looked through, too."""
    return len(options.EmbeddingTokens) > MANY_IDS or request.is_heavy(options)


def too_long(error: VLLMValidationError, field: str, limit: int) -> InvalidRequest | None:
    """vLLM's refusal of a long input in the words of an embedding; None for any other refusal."""
    unit = {"input_tokens": "tokens", "input_text": "characters"}.get(str(error.parameter))
    if unit is None:
        return None
    # The tokenizer stops at the first token too many.
    least = "at least " if unit == "tokens" and error.value == limit + 1 and field != "EmbeddingTokens" else ""
    return _longer(field, f"{least}{error.value} {unit}", limit)


def _longer(field: str, length: str, limit: int) -> InvalidRequest:
    cut = f'Metadata["{TRUNCATE}"] = "-1"'
    return InvalidRequest(field, f"has {length}; the model takes {limit} tokens at most. {cut} cuts what is longer")


def input_limit(config: ModelConfig) -> int | None:
    """Most tokens of an input; None where the model was loaded to take long ones in chunks."""
    pooler = config.pooler_config
    return pooler.max_embed_len or (None if pooler.enable_chunked_processing else config.max_model_len)


def _token_ids(options: pb.PredictOptions, config: ModelConfig, *, truncated: bool) -> list[int]:
    field, count, limit = "EmbeddingTokens", len(options.EmbeddingTokens), input_limit(config)
    if limit is not None and count > limit and not truncated:
        raise _longer(field, f"{count} tokens", limit)
    return checked_ids(field, options.EmbeddingTokens, config.get_vocab_size())


def _length(message: pb.Message) -> int:
    """Characters that a template may write of a message."""
    texts = (message.content, message.name, message.tool_call_id, message.reasoning_content, message.tool_calls)
    return sum(map(len, texts))


def _check_length(field: str, count: int) -> None:
    """Refuse what the tokenizer would be busy with for seconds."""
    if count > MOST_CHARACTERS:
        raise InvalidRequest(field, f"has {count} characters; use at most {MOST_CHARACTERS}")


def _truncation(options: pb.PredictOptions, config: ModelConfig) -> int | None:
    number = whole_number(options, TRUNCATE)
    most = min(config.max_model_len, input_limit(config) or config.max_model_len)
    if number is not None and number != -1 and not 1 <= number <= most:
        raise InvalidRequest(
            f'Metadata["{TRUNCATE}"]', f"{number} is not possible; use 1 to {most}, or -1 for the model's own limit"
        )
    return number
