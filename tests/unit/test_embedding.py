"""What an Embedding asks for, and how vectors are written; no engine."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import PoolerConfig
from vllm.entrypoints.pooling.embed.protocol import EmbeddingChatRequest, EmbeddingCompletionRequest
from vllm.exceptions import VLLMValidationError

from common.embedding import embedding_result
from common.embedding_request import EmbeddingRequest, embedding_request, input_limit, is_heavy, too_long
from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.tokens import MOST_CHARACTERS

CONTEXT, VOCABULARY = 16, 100
LONG = "a" * MOST_CHARACTERS
HELLO = pb.Message(role="user", content="Hello!")
PNG = "iVBORw0KGgo="


@dataclasses.dataclass
class Config:
    """What is read of a model's configuration."""

    max_model_len: int = CONTEXT
    pooler_config: Any = dataclasses.field(default_factory=PoolerConfig)
    multimodal_config: Any = None
    encoder_config: Any = None

    def get_vocab_size(self) -> int:
        return VOCABULARY


def understood(config: Any = None, **fields: Any) -> EmbeddingRequest:
    return embedding_request(pb.PredictOptions(**fields), config or Config())


def with_metadata(key: str, value: str) -> Any:
    return understood(Embeddings="a", Metadata={key: value}).openai


@pytest.mark.parametrize(
    ("fields", "field", "inputs"),
    [
        ({"Embeddings": "a b"}, "Embeddings", "a b"),
        ({"EmbeddingTokens": [1, 2]}, "EmbeddingTokens", [1, 2]),
        ({"EmbeddingTokens": [0, VOCABULARY - 1]}, "EmbeddingTokens", [0, VOCABULARY - 1]),
        # The orchestrator sends the ids with an empty text.
        ({"Embeddings": "a", "EmbeddingTokens": [1]}, "Embeddings", "a"),
        ({"Embeddings": "a", "UseTokenizerTemplate": True, "Messages": [HELLO]}, "Embeddings", "a"),
        ({"Embeddings": " "}, "Embeddings", " "),
        ({"Images": [PNG]}, "Embeddings", ""),
        # What the orchestrator adds to every request.
        ({"Embeddings": "a", "Temperature": 9, "TopK": -7, "Prompt": "b", "Seed": 3, "Batch": 512}, "Embeddings", "a"),
    ],
)
def test_input(fields: dict[str, Any], field: str, inputs: Any) -> None:
    request = understood(**fields)
    assert isinstance(request.openai, EmbeddingCompletionRequest)
    assert (request.field, request.openai.input) == (field, inputs)


def test_a_chat() -> None:
    request = understood(
        UseTokenizerTemplate=True, Messages=[HELLO], Images=[PNG], Metadata={"enable_thinking": "true"}
    )
    assert isinstance(request.openai, EmbeddingChatRequest)
    assert request.field == "Messages"
    (message,) = request.openai.messages
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert request.openai.chat_template_kwargs == {"enable_thinking": True, "thinking": True}
    assert not request.openai.add_generation_prompt


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Embeddings: is empty, and so is EmbeddingTokens"),
        ({"Prompt": "a"}, "Embeddings: is empty"),
        ({"Messages": [HELLO]}, "Embeddings: is empty"),
        ({"UseTokenizerTemplate": True, "Messages": [pb.Message(role="cat")]}, r"Messages\[0\].role: 'cat'"),
        ({"EmbeddingTokens": [5, VOCABULARY]}, r"EmbeddingTokens\[1\]: 100 is not a token id; use 0 to 99"),
        ({"EmbeddingTokens": [-1]}, r"EmbeddingTokens\[0\]: -1 is not a token id"),
        ({"EmbeddingTokens": [1] * (CONTEXT + 1)}, "EmbeddingTokens: has 17 tokens; the model takes 16 tokens at most"),
        ({"EmbeddingTokens": [1], "Images": [PNG]}, "Images: can't be embedded with EmbeddingTokens"),
        ({"Embeddings": "a" * (MOST_CHARACTERS + 1)}, "Embeddings: has 2000001 characters"),
        *(
            ({"UseTokenizerTemplate": True, "Messages": [pb.Message(**message)]}, r"Messages: has \d{7} characters")
            for message in (
                {"role": "user", "content": LONG, "name": "b"},
                {"role": "assistant", "content": "a", "reasoning_content": LONG},
                {
                    "role": "assistant",
                    "tool_calls": json.dumps([{"function": {"name": LONG}}]),
                },
            )
        ),
        ({"Embeddings": "a", "Images": ["cat:"]}, r"Images\[0\]: "),
        ({"Embeddings": "a", "CorrelationId": "\n"}, "CorrelationId: "),
    ],
)
def test_an_input_that_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{text}"):
        understood(**fields)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dimensions", "8", 8),
        ("use_activation", "false", False),
        ("use_activation", "true", True),
        ("truncate_prompt_tokens", "-1", -1),
        ("truncate_prompt_tokens", "16", 16),
        ("truncation_side", "left", "left"),
        ("cache_salt", "a", "a"),
        ("padding", "max_length", "max_length"),
        ("dimensions", "", None),
        ("cache_salt", "", None),
        ("truncation_side", "", None),
    ],
)
def test_metadata(key: str, value: str, expected: Any) -> None:
    assert getattr(with_metadata(key, value), key) == expected


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("dimensions", "many", "'many' is not a whole number"),
        ("dimensions", "9" * 5000, "is not a whole number"),
        ("use_activation", "no", "'no' is unknown; use true or false"),
        ("truncate_prompt_tokens", "17", "17 is not possible; use 1 to 16, or -1"),
        ("truncate_prompt_tokens", "0", "0 is not possible"),
        ("truncate_prompt_tokens", "-2", "-2 is not possible"),
        ("truncation_side", "middle", "'middle' is unknown; use left or right"),
        ("cache_salt", "a@b", "cache_salt"),
        ("data_parallel_rank", "0", "pins no embedding to a rank"),
        ("padding", "longest", "'longest' is unknown; use max_length or do_not_pad"),
    ],
)
def test_metadata_that_is_refused(key: str, value: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        with_metadata(key, value)
    assert caught.value.field == f'Metadata["{key}"]'


def test_ids_beyond_the_context_are_taken_where_they_will_be_cut() -> None:
    ids = [1] * (CONTEXT + 1)
    assert understood(EmbeddingTokens=ids, Metadata={"truncate_prompt_tokens": "-1"}).openai.input == ids
    chunked = Config(pooler_config=PoolerConfig(enable_chunked_processing=True))
    assert understood(chunked, EmbeddingTokens=ids).openai.input == ids


def test_an_adapter_is_heard_of() -> None:
    assert understood(Embeddings="a", Metadata={"lora": "x"}).adapter == "x"


@pytest.mark.parametrize(
    ("pooler", "limit"),
    [
        (PoolerConfig(), CONTEXT),
        (PoolerConfig(max_embed_len=8), 8),
        (PoolerConfig(enable_chunked_processing=True), None),
        (PoolerConfig(enable_chunked_processing=True, max_embed_len=64), 64),
    ],
)
def test_the_limit_is_vllms(pooler: PoolerConfig, limit: int | None) -> None:
    config: Any = Config(pooler_config=pooler)
    assert input_limit(config) == limit
    assert EmbeddingCompletionRequest(input="a").build_tok_params(config).max_input_tokens == limit


def test_who_is_understood_in_a_thread() -> None:
    assert not is_heavy(pb.PredictOptions(Embeddings="a" * 100_000, EmbeddingTokens=[1] * 8192))
    assert is_heavy(pb.PredictOptions(EmbeddingTokens=[1] * 100_000))
    assert is_heavy(pb.PredictOptions(Images=[PNG]))
    assert is_heavy(pb.PredictOptions(Messages=[pb.Message(role="user", content="a")] * 1000))


@pytest.mark.parametrize(
    ("parameter", "value", "field", "text"),
    [
        ("input_tokens", 17, "Embeddings", "Embeddings: has at least 17 tokens; the model takes 16 tokens at most. "),
        ("input_tokens", 17, "EmbeddingTokens", "EmbeddingTokens: has 17 tokens; "),
        ("input_tokens", 30, "Messages", "Messages: has 30 tokens; "),
        ("input_text", 9999, "Embeddings", "Embeddings: has 9999 characters; the model takes 16 tokens at most. "),
    ],
)
def test_a_long_input(parameter: str, value: int, field: str, text: str) -> None:
    refused = too_long(VLLMValidationError("vLLM's words", parameter=parameter, value=value), field, CONTEXT)
    assert str(refused).startswith(text)
    assert str(refused).endswith('Metadata["truncate_prompt_tokens"] = "-1" cuts what is longer')
    assert too_long(VLLMValidationError("other", parameter="cache_salt"), field, CONTEXT) is None


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
def test_a_vector(numbers: list[float]) -> None:
    result = embedding_result(torch.tensor(numbers), 7)
    assert list(result.embeddings) == numbers
    assert (result.tokens, result.dim, result.prompt_tokens) == (1, len(numbers), 7)
    assert result.layout == pb.EMBEDDING_LAYOUT_FINAL
    assert pb.EmbeddingResult.FromString(result.SerializeToString()) == result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_for_each_token(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    # Transposed twice: its memory has the columns one after the other.
    result = embedding_result(rows.T.contiguous().T, 2)
    assert list(result.embeddings) == [1, 2, 3, 4, 5, 6]
    assert (result.tokens, result.dim, result.prompt_tokens) == (2, 3, 2)
    assert result.layout == pb.EMBEDDING_LAYOUT_PER_TOKEN


def test_one_token_alone_is_still_one_of_many() -> None:
    result = embedding_result(torch.tensor([[1.0, 2.0]]), 1)
    assert (result.tokens, result.dim, result.layout) == (1, 2, pb.EMBEDDING_LAYOUT_PER_TOKEN)
