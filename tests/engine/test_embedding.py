"""Embeddings of a real engine, held against transformers on the same weights."""

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

from common.engine_config import configure
from common.engine_log import StageClock
from common.errors import InvalidRequest, LoadFailed, Overloaded, Unsupported
from common.model import Model, plan_load
from common.pb import backend_pb2 as pb
from tests.engine.conftest import Engines
from tests.engine.sentences import SENTENCES, embedded, hidden, loaded
from tests.engine.wire import options
from tests.models import ensure, training
from tests.models.script import line

AT_ONCE = 64
CONTEXT = 256
WIDTH = 384
# What the orchestrator adds for every model, and for some by what they are called.
IMPOSED = json.dumps({"enable_prefix_caching": True, "enable_chunked_prefill": True})
PARSERS = ("tool_parser:hermes", "reasoning_parser:qwen3")
QUESTION = "What is the capital of France?"
LONG = "the quick brown fox jumps over the lazy dog and the river " * 120


def tensor(result: pb.EmbeddingResult) -> torch.Tensor:
    """`[tokens, dim]`."""
    assert len(result.embeddings) == result.tokens * result.dim
    return torch.tensor(result.embeddings).reshape(result.tokens, result.dim)


def vector(result: pb.EmbeddingResult) -> torch.Tensor:
    assert (result.tokens, result.layout) == (1, pb.EMBEDDING_LAYOUT_FINAL)
    return tensor(result)[0]


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """1 - cosine, the largest of all rows; in doubles, whose own error is out of sight."""
    return float((1 - torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1)).max())


async def embed(model: Model, text: str = "", **fields: Any) -> pb.EmbeddingResult:
    return await model.embed(pb.PredictOptions(Embeddings=text, **fields))


async def embed_all(model: Model, texts: Iterable[str], at_once: int) -> torch.Tensor:
    seats = asyncio.Semaphore(at_once)

    async def one(text: str) -> torch.Tensor:
        async with seats:
            return vector(await embed(model, text))

    return torch.stack(await asyncio.gather(*(one(text) for text in texts)))


@pytest.fixture
async def minilm(engines: Engines) -> Model:
    """all-MiniLM-L6-v2, loaded as the orchestrator does it."""
    return await engines.get(
        *PARSERS, Model=str(ensure("minilm")), Embeddings=True, MaxModelLen=0, ContextSize=4096, EngineArgs=IMPOSED
    )


@pytest.mark.parametrize("at_once", [1, AT_ONCE])
async def test_two_hundred_sentences_as_transformers_embeds_them(minilm: Model, at_once: int) -> None:
    assert len(set(SENTENCES)) == 200
    found, expected = await embed_all(minilm, SENTENCES, at_once), embedded(SENTENCES)
    worst = distance(found, expected)
    print(f"{at_once} at once: 1 - cosine <= {worst:.1e}, numbers differ by <= {(found - expected).abs().max():.1e}")
    assert worst < 1e-4
    # The measure tells sentences apart: any two of these are a hundred times as far from each other.
    assert distance(found[:-1], expected[1:]) > 1e-2


async def test_what_comes_with_a_vector(minilm: Model) -> None:
    result = await embed(minilm, QUESTION)
    assert (result.dim, result.tokens) == (WIDTH, 1)
    tokens = await minilm.tokenize(pb.PredictOptions(Prompt=QUESTION))
    assert result.prompt_tokens == tokens.length == len(loaded()[0](QUESTION)["input_ids"])
    assert (await minilm.detokenize(pb.DetokenizeRequest(tokens=tokens.tokens))).content == (
        "[CLS] what is the capital of france? [SEP]"
    )
    assert (await minilm.tokenize(pb.PredictOptions())).length == len(loaded()[0]("")["input_ids"]) == 2


async def test_ids_are_embedded_as_they_are(minilm: Model) -> None:
    ids = loaded()[0](QUESTION)["input_ids"]
    by_text, by_ids = await embed(minilm, QUESTION), await embed(minilm, EmbeddingTokens=ids)
    assert distance(vector(by_text), vector(by_ids)) < 1e-6
    assert by_ids.prompt_tokens == len(ids)
    # No special tokens are added to ids.
    assert distance(vector(by_text), vector(await embed(minilm, EmbeddingTokens=ids[1:-1]))) > 1e-3
    with pytest.raises(InvalidRequest, match=r"EmbeddingTokens\[0\]: 30522 is not a token id; use 0 to 30521"):
        await embed(minilm, EmbeddingTokens=[30522])


async def test_the_activation_is_the_length(minilm: Model) -> None:
    unit = vector(await embed(minilm, QUESTION))
    raw = vector(await embed(minilm, QUESTION, Metadata={"use_activation": "false"}))
    assert abs(float(unit.norm()) - 1) < 1e-5
    assert torch.allclose(raw, hidden(QUESTION).mean(dim=0), atol=1e-4)
    assert abs(float(raw.norm()) - 1) > 0.1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"Embeddings": "word " * 255}, "Embeddings: has at least 257 tokens; the model takes 256 tokens at most."),
        ({"Embeddings": "word " * 99_999}, "Embeddings: has 499995 characters; the model takes 256 tokens at most."),
        ({"EmbeddingTokens": [7] * 257}, "EmbeddingTokens: has 257 tokens; the model takes 256 tokens at most."),
    ],
)
async def test_what_is_too_long_is_cut_only_on_request(minilm: Model, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{text}"):
        await minilm.embed(pb.PredictOptions(**fields))
    cut = await minilm.embed(pb.PredictOptions(**fields, Metadata={"truncate_prompt_tokens": "-1"}))
    assert cut.prompt_tokens == CONTEXT
    short = await minilm.embed(pb.PredictOptions(**fields, Metadata={"truncate_prompt_tokens": "9"}))
    assert short.prompt_tokens == 9


async def test_a_text_is_cut_as_transformers_cuts_it(minilm: Model) -> None:
    text = "A long story about a cat, and a mat, and how it came to sit there. " * 40
    cut = await embed(minilm, text, Metadata={"truncate_prompt_tokens": "-1"})
    tokenizer, model = loaded()
    with torch.no_grad():
        state = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=CONTEXT)).last_hidden_state
    assert distance(vector(cut), state[0].mean(dim=0)) < 1e-4


async def test_the_context_is_filled(minilm: Model) -> None:
    text = "word " * 254
    assert (await embed(minilm, text)).prompt_tokens == CONTEXT


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "Embeddings: is empty"),
        ({"Embeddings": "a", "Metadata": {"dimensions": "8"}}, r'Metadata\["dimensions"\]: .*Matryoshka'),
        ({"Embeddings": "a", "Metadata": {"lora": "x"}}, r'Metadata\["lora"\]: no adapter .x. is loaded'),
        ({"Embeddings": "a", "Images": ["iVBORw0KGgo="]}, "Images: this model takes text only"),
        ({"UseTokenizerTemplate": True, "Messages": [pb.Message(role="user", content="a")]}, "Messages: "),
    ],
)
async def test_what_this_model_does_not_take(minilm: Model, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{text}"):
        await minilm.embed(pb.PredictOptions(**fields))


async def test_it_writes_nothing(minilm: Model) -> None:
    with pytest.raises(Unsupported, match=r"^Predict needs a model that generates .* model embeds texts$"):
        await minilm.predict(options(line("plain")))
    with pytest.raises(Unsupported, match="PredictStream needs a model that generates"):
        await anext(minilm.predict_stream(options(line("plain"))))


@pytest.mark.parametrize("delay", [0, 0.001, 0.01])
async def test_a_caller_who_goes_away(minilm: Model, delay: float) -> None:
    tasks = [asyncio.create_task(embed(minilm, text)) for text in SENTENCES]
    await asyncio.sleep(delay)
    for task in tasks:
        task.cancel()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(end, asyncio.CancelledError) for end in ends) > len(ends) / 2
    async with asyncio.timeout(10):
        while minilm.running_requests:  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.01)
    assert distance(vector(await embed(minilm, QUESTION)), embedded([QUESTION])[0]) < 1e-4


async def test_no_more_than_are_admitted(minilm: Model) -> None:
    limits = minilm._engine.llm.vllm_config.scheduler_config
    most, limits.max_num_queued_reqs = limits.max_num_queued_reqs, 8
    try:
        ends = await asyncio.gather(*(embed(minilm, text) for text in SENTENCES), return_exceptions=True)
    finally:
        limits.max_num_queued_reqs = most
    refused = [end for end in ends if isinstance(end, Overloaded)]
    assert refused
    assert all(isinstance(end, Overloaded | pb.EmbeddingResult) for end in ends)


async def test_a_vector_for_each_token(engines: Engines) -> None:
    model = await engines.get("pooling:none", Model=str(ensure("minilm")), Embeddings=True, MaxModelLen=0)
    expected = hidden(QUESTION)
    raw = await embed(model, QUESTION, Metadata={"use_activation": "false"})
    assert raw.layout == pb.EMBEDDING_LAYOUT_PER_TOKEN
    assert (raw.tokens, raw.dim, raw.prompt_tokens) == (len(expected), WIDTH, len(expected))
    assert torch.allclose(tensor(raw), expected, atol=1e-4)
    unit = tensor(await embed(model, QUESTION))
    assert torch.allclose(unit, torch.nn.functional.normalize(expected, dim=-1), atol=1e-4)
    results = await asyncio.gather(*(embed(model, text) for text in SENTENCES[:AT_ONCE]))
    for text, result in zip(SENTENCES, results, strict=False):
        assert distance(tensor(result), hidden(text)) < 1e-4


def lyon() -> Path:
    return ensure("adapters") / "lyon"


@pytest.fixture
async def chat_model(engines: Engines) -> Model:
    """The scripted model, which writes, made to embed; with an adapter, and with all that vLLM can switch on."""
    engine_args = json.loads(IMPOSED) | {
        "hf_overrides": {"is_matryoshka": True},
        "pooler_config": {"enable_chunked_processing": True},
    }
    return await engines.get(
        Embeddings=True, EngineArgs=json.dumps(engine_args), LoraAdapters=[str(lyon()), f"other={lyon()}"]
    )


def last_state(ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """The last token's hidden state, of length 1: what a model that writes is pooled by."""
    _, model = training.loaded(ensure("scripted"), adapter)
    with torch.no_grad():
        state = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state, dim=-1)


def scripted_ids(text: str) -> list[int]:
    ids: list[int] = training.loaded(ensure("scripted"))[0].encode(text)
    return ids


def cached_tokens() -> int:
    """Prompt tokens that the engine has found in its prefix cache."""
    (counter,) = [metric for metric in get_metrics_snapshot() if metric.name == "vllm:prefix_cache_hits"]
    assert isinstance(counter, Counter)
    return int(counter.value)


async def test_a_chat_model_embeds(chat_model: Model) -> None:
    before = cached_tokens()
    for _ in range(2):
        for text in (QUESTION, *SENTENCES[:12]):
            result = await embed(chat_model, text)
            assert result.prompt_tokens == len(scripted_ids(text))
            assert distance(vector(result), last_state(scripted_ids(text))) < 1e-4
    assert cached_tokens() > before


async def test_an_adapter(chat_model: Model) -> None:
    ids = scripted_ids(training.prompt_of(ensure("scripted"), line("plain").messages))
    names = ["lyon", "none", "", "lyon"]
    results = await asyncio.gather(*(embed(chat_model, EmbeddingTokens=ids, Metadata={"lora": name}) for name in names))
    base, adapted = last_state(ids), last_state(ids, lyon())
    assert distance(base, adapted) > 1e-2
    for name, result in zip(names, results, strict=True):
        assert distance(vector(result), adapted if name == "lyon" else base) < 1e-4
    with pytest.raises(InvalidRequest, match=r'Metadata\["lora"\]: no adapter .paris. is loaded; use lyon'):
        await embed(chat_model, QUESTION, Metadata={"lora": "paris"})


async def test_a_chat_is_embedded_by_its_template(chat_model: Model) -> None:
    request = options(line("plain"))
    result = await chat_model.embed(request)
    tokenizer, _ = training.loaded(ensure("scripted"))
    ids = tokenizer.apply_chat_template(list(line("plain").messages), add_generation_prompt=False, return_dict=False)
    assert result.prompt_tokens == len(ids)
    assert distance(vector(result), last_state(ids)) < 1e-4


async def test_fewer_dimensions(chat_model: Model) -> None:
    whole = vector(await embed(chat_model, QUESTION, Metadata={"use_activation": "false"}))
    few = await embed(chat_model, QUESTION, Metadata={"dimensions": "16"})
    assert few.dim == 16
    assert torch.allclose(vector(few), torch.nn.functional.normalize(whole[:16], dim=-1), atol=1e-5)
    with pytest.raises(InvalidRequest, match=r'Metadata\["dimensions"\]: .*range \[1, 128\], got 129'):
        await embed(chat_model, QUESTION, Metadata={"dimensions": "129"})


async def test_a_long_text_in_chunks(chat_model: Model) -> None:
    ids, context = scripted_ids(LONG), chat_model._engine.llm.model_config.max_model_len
    assert 2 * context < len(ids) < 3 * context
    result = await embed(chat_model, LONG)
    assert result.prompt_tokens == len(ids)
    chunks = [ids[start : start + context] for start in range(0, len(ids), context)]
    mean = sum(len(chunk) * last_state(chunk) for chunk in chunks)
    assert isinstance(mean, torch.Tensor)
    assert distance(vector(result), mean) < 1e-4
    assert abs(float(vector(result).norm()) - 1) < 1e-5
    task = asyncio.create_task(embed(chat_model, LONG))
    await asyncio.sleep(0.05)
    task.cancel()
    async with asyncio.timeout(10):
        while chat_model.running_requests:  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "most", "words"),
    [
        ("max_num_queued_reqs", 2, r"would be 3 requests at a time; 2 are admitted \(--max-waiting-requests\)"),
        ("max_num_queued_tokens", 2048, r"2049 prompt tokens or more .*; 2048 are admitted \(--max-waiting-tokens\)"),
    ],
)
async def test_more_chunks_than_are_ever_admitted(
    chat_model: Model, monkeypatch: pytest.MonkeyPatch, name: str, most: int, words: str
) -> None:
    limits = chat_model._engine.llm.vllm_config.scheduler_config
    monkeypatch.setattr(limits, name, most)
    with pytest.raises(InvalidRequest, match=f"^Embeddings: .*{words}"):
        await embed(chat_model, LONG)
    monkeypatch.setattr(limits, name, most + 1)
    assert (await embed(chat_model, LONG)).prompt_tokens == len(scripted_ids(LONG))


@pytest.mark.parametrize(
    ("name", "fields", "runner", "convert"),
    [
        ("minilm", {}, "pooling", "none"),
        ("scripted", {}, "generate", "none"),
        ("scripted", {"Embeddings": True}, "pooling", "embed"),
        ("scripted", {"Embeddings": True, "EngineArgs": '{"runner": "generate"}'}, "generate", "none"),
    ],
)
def test_what_a_model_is_loaded_for(name: str, fields: dict[str, Any], runner: str, convert: str) -> None:
    config, _ = configure(plan_load(pb.ModelOptions(Model=str(ensure(name)), DType="float32", **fields)))
    assert (config.model_config.runner_type, config.model_config.convert_type) == (runner, convert)


async def test_a_load_for_what_the_model_cannot_do(engines: Engines) -> None:
    await engines.close()
    wire = pb.ModelOptions(Model=str(ensure("minilm")), EngineArgs='{"runner": "generate"}')
    with pytest.raises(LoadFailed, match="Embedding models do not support `--runner generate`"):
        await Model.load(plan_load(wire), StageClock(lambda _stage, _seconds: None))
