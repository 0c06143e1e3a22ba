"""An embedding model as the orchestrator runs it."""

import concurrent.futures
import json
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from common.pb import backend_pb2 as pb
from tests.models import ensure
from tests.process.orchestrator import Backend
from tests.process.wire import chat, model_options

CALLS = 64
# The orchestrator sets these for every model, and parsers for some by what they are called.
IMPOSED = json.dumps({"enable_prefix_caching": True, "enable_chunked_prefill": True})
NOISE: dict[str, Any] = {
    "Temperature": 0.9,
    "TopP": 0.95,
    "TopK": 40,
    "Seed": 1869,
    "NKeep": 1,
    "Threads": 4,
    "Batch": 512,
}


@pytest.fixture(scope="module")
def embedder(backend: Backend) -> Iterator[Backend]:
    """A server with all-MiniLM-L6-v2 in it."""
    options = model_options(
        ensure("minilm"), "tool_parser:hermes", "reasoning_parser:qwen3", Embeddings=True, EngineArgs=IMPOSED
    )
    result = backend.load(options)
    assert result.success, result.message
    yield backend
    stop = backend.stop()
    assert (stop.status, stop.killed) == (0, False)


def embed(backend: Backend, text: str = "", **fields: Any) -> pb.EmbeddingResult:
    result: pb.EmbeddingResult = backend.call("Embedding", pb.PredictOptions(Embeddings=text, **NOISE, **fields))
    assert result.layout == pb.EMBEDDING_LAYOUT_FINAL
    assert (result.tokens, result.dim) == (1, len(result.embeddings))
    return result


def cosine(one: pb.EmbeddingResult, other: pb.EmbeddingResult) -> float:
    return float(np.dot(one.embeddings, other.embeddings))


def test_it_is_loaded_as_it_can_be(embedder: Backend) -> None:
    assert "without enable_chunked_prefill, enable_prefix_caching, which vLLM does not support" in embedder.stderr
    assert "no parsers: the model is loaded for embeddings" in embedder.stderr


def test_meaning(embedder: Backend) -> None:
    cat, kitten, invoice = (
        embed(embedder, text)
        for text in ("A cat sleeps on the mat.", "The kitten is napping on a rug.", "Please pay the invoice by Monday.")
    )
    assert cat.dim == 384
    assert cat.prompt_tokens == 9
    assert cosine(cat, cat) == pytest.approx(1, abs=1e-5)
    assert cosine(cat, kitten) > 0.5
    assert cosine(cat, invoice) < 0.2


def test_ids(embedder: Backend) -> None:
    text = "A cat sleeps on the mat."
    tokens = embedder.call("TokenizeString", pb.PredictOptions(Prompt=text)).tokens
    assert (
        embedder.call("Detokenize", pb.DetokenizeRequest(tokens=tokens)).content
        == "[CLS] a cat sleeps on the mat. [SEP]"
    )
    assert cosine(embed(embedder, text), embed(embedder, EmbeddingTokens=tokens)) == pytest.approx(1, abs=1e-5)


def test_many_at_once(embedder: Backend) -> None:
    words = [f"This is the sentence number {number}." for number in range(CALLS)]
    with concurrent.futures.ThreadPoolExecutor(CALLS) as pool:
        together = list(pool.map(lambda text: embed(embedder, text), words))
    for number in (0, CALLS - 1):
        assert cosine(embed(embedder, words[number]), together[number]) == pytest.approx(1, abs=1e-5)
    assert cosine(together[0], together[-1]) < 0.999


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({}, grpc.StatusCode.INVALID_ARGUMENT, "Embeddings: is empty"),
        ({"Embeddings": "word " * 300}, grpc.StatusCode.INVALID_ARGUMENT, "Embeddings: has at least 257 tokens"),
        ({"EmbeddingTokens": [-5]}, grpc.StatusCode.INVALID_ARGUMENT, "EmbeddingTokens[0]: -5"),
        ({"Embeddings": "a", "ModelIdentity": "other"}, grpc.StatusCode.NOT_FOUND, "model identity mismatch"),
    ],
)
def test_what_is_refused(embedder: Backend, fields: dict[str, Any], code: grpc.StatusCode, words: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        embedder.call("Embedding", pb.PredictOptions(**fields))
    assert caught.value.code() == code
    assert words in str(caught.value.details())


def test_it_writes_nothing(embedder: Backend) -> None:
    for answer in (lambda: embedder.call("Predict", chat("Hello!")), lambda: embedder.stream(chat("Hello!"))):
        with pytest.raises(grpc.RpcError) as caught:
            answer()
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert str(caught.value.details()).endswith("the loaded model embeds texts")
    assert embed(embedder, "a").dim == 384
