"""Rerank on real engines: the scores of `transformers` on the same weights, for each kind of model that ranks."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)
from vllm.entrypoints.pooling.scoring.io_processor import JinaRankingIOProcessorMixin

from common import ranking
from common.errors import InvalidRequest, Overloaded, Unsupported
from common.model import Model
from common.pb import backend_pb2 as pb
from common.pooling import pool
from tests.engine.conftest import Engines
from tests.models import ensure, listwise, toy
from tests.models.berts import CONTEXT, TEXT
from tests.models.judge import NO, YES
from tests.models.listwise import IDS

QUERY = "Was ist die Hauptstadt von Frankreich?"
MANY = 1000
ROUNDING = 1e-5
DOCUMENTS = [*TEXT.splitlines(), "Paris", "Paris", "", " \n", "北京 🎉 e\u0301" * 3, QUERY]

Reference = Callable[[Path, Any, str, Sequence[str]], list[float]]


def cross_encoder(folder: Path, tokenizer: Any, query: str, documents: Sequence[str]) -> list[float]:
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    pairs = [tokenizer(query, document, return_tensors="pt") for document in documents]
    return [float(torch.sigmoid(model(**pair).logits).squeeze()) for pair in pairs]


def bi_encoder(folder: Path, tokenizer: Any, query: str, documents: Sequence[str]) -> list[float]:
    model = BertModel.from_pretrained(folder).eval()
    vectors = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in (query, *documents)]
    return [float(torch.cosine_similarity(vectors[0], vector, dim=0)) for vector in vectors[1:]]


def late_interaction(folder: Path, tokenizer: Any, query: str, documents: Sequence[str]) -> list[float]:
    weights = load_file(folder / "model.safetensors")
    projection = weights.pop("linear.weight")
    model = BertModel(BertConfig.from_pretrained(folder)).eval()
    model.load_state_dict({name.removeprefix("bert."): tensor for name, tensor in weights.items()})
    tokens = [
        torch.nn.functional.normalize(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] @ projection.T)
        for text in (query, *documents)
    ]
    return [float((tokens[0] @ document.T).amax(dim=-1).sum()) for document in tokens[1:]]


def judge(folder: Path, tokenizer: Any, query: str, documents: Sequence[str]) -> list[float]:
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    no, yes = tokenizer.convert_tokens_to_ids([NO, YES])

    def score(document: str) -> float:
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        logits = model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        return float(logits[yes] - logits[no])

    return [score(document) for document in documents]


KINDS: dict[str, tuple[str, Reference]] = {
    "cross_encoder": ("berts/cross_encoder", cross_encoder),
    "bi_encoder": ("berts/bi_encoder", bi_encoder),
    "late_interaction": ("berts/late_interaction", late_interaction),
    "judge": ("judge", judge),
}


def folder(path: str) -> Path:
    recipe, _, rest = path.partition("/")
    return ensure(recipe) / rest


async def ranker(engines: Engines, kind: str) -> Model:
    return await engines.get(Model=str(folder(KINDS[kind][0])), MaxModelLen=CONTEXT, Reranking=True)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def refuses_many_pairs(model: Model, kind: str) -> None:
    """Where the query is read with each document, it counts with each."""
    request = pb.RerankRequest(query=QUERY, documents=["Paris"] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MOST_OF_PAIRS", 2 * len(QUERY))
        if kind in ("cross_encoder", "judge"):
            with pytest.raises(InvalidRequest, match="each with the query"):
                await model.rerank(request)
        else:
            assert len((await model.rerank(request)).results) == 2


async def test_scores(engines: Engines, kind: str) -> None:
    model = await ranker(engines, kind)
    await refuses_many_pairs(model, kind)
    path, reference = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder(path))
    with torch.inference_mode():
        expected = reference(folder(path), tokenizer, QUERY, DOCUMENTS)
    assert max(expected) - min(expected) > 0.1  # else agreement would mean little
    result = await model.rerank(pb.RerankRequest(query=QUERY, documents=DOCUMENTS))

    found = {each.index: each.relevance_score for each in result.results}
    assert [found[index] for index in range(len(DOCUMENTS))] == pytest.approx(expected, abs=1e-3)
    assert [each.text for each in result.results] == [DOCUMENTS[each.index] for each in result.results]
    order = [(-each.relevance_score, each.index) for each in result.results]
    assert order == sorted(order)
    # "Paris" twice; how sums are rounded depends on what else is in the batch.
    assert found[4] == pytest.approx(found[5], abs=ROUNDING)
    assert result.usage.total_tokens == result.usage.prompt_tokens == used(kind, tokenizer)

    for top_n in (1, 3, len(DOCUMENTS), 1000):
        best = await model.rerank(pb.RerankRequest(query=QUERY, documents=DOCUMENTS, top_n=top_n))
        assert len(best.results) == min(top_n, len(DOCUMENTS))
        for one, other in zip(best.results, result.results, strict=False):
            assert one.relevance_score == pytest.approx(other.relevance_score, abs=ROUNDING)
            assert one.relevance_score == pytest.approx(found[one.index], abs=ROUNDING)
        assert best.usage == result.usage

    if kind == "cross_encoder":  # counted in tokens, whatever the characters
        blank = await model.rerank(pb.RerankRequest(query=QUERY, documents=[" " * 100_000 + "Paris"]))
        assert blank.results[0].relevance_score == pytest.approx(found[4])

    await refuses_what_is_too_long(model)
    await leaves_nothing_running(model)
    await cannot_do_anything_else(model)


def used(kind: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Tokens that the model sees."""
    if kind == "cross_encoder":
        return sum(len(tokenizer(QUERY, document).input_ids) for document in DOCUMENTS)
    if kind == "judge":
        return sum(
            len(
                tokenizer(
                    tokenizer.apply_chat_template(
                        [{"role": "query", "content": QUERY}, {"role": "document", "content": document}],
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                ).input_ids
            )
            for document in DOCUMENTS
        )
    return sum(len(tokenizer(text).input_ids) for text in (QUERY, *DOCUMENTS))


async def refuses_what_is_too_long(model: Model) -> None:
    documents = ["Paris"] * 20
    for length, problem in ((CONTEXT, "128 tokens"), (10_000, "128 tokens"), (1_000_000, "5000000 characters")):
        documents[7] = "Köln " * length
        with pytest.raises(InvalidRequest, match=rf"documents\[7\]: .*{problem}") as refusal:
            await model.rerank(pb.RerankRequest(query=QUERY, documents=documents))
        assert "Köln" not in str(refusal.value)
        assert model.running_requests == 0
    for length in (CONTEXT, 1_000_000):
        with pytest.raises(InvalidRequest, match="query"):
            await model.rerank(pb.RerankRequest(query="Köln " * length, documents=["Paris"]))
    for request, field in (
        (pb.RerankRequest(documents=["a"]), "query"),
        (pb.RerankRequest(query="q"), "documents"),
        (pb.RerankRequest(query="q", documents=["a"], top_n=-1), "top_n"),
        (pb.RerankRequest(query="q", documents=["a"] * 5000), "documents"),
    ):
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            await model.rerank(request)


async def running(model: Model, requests: int) -> None:
    """Return when so many requests are in the engine."""
    async with asyncio.timeout(30):
        while model.running_requests < requests:  # noqa: ASYNC110  # the engine's client counts, and tells nobody
            await asyncio.sleep(0)


async def leaves_nothing_running(model: Model) -> None:
    request = pb.RerankRequest(query=QUERY, documents=[f"{index} {TEXT[:30]}" for index in range(MANY)])
    for requests in (0, 1, MANY // 4):  # while documents are tokenized, come, and are in the engine all at once
        task = asyncio.create_task(model.rerank(request))
        await asyncio.sleep(0.01)
        await running(model, requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert model.running_requests == 0
    await one_failure_is_all(model, request)
    limits = model._engine.llm.vllm_config.scheduler_config
    usual, limits.max_num_queued_reqs = limits.max_num_queued_reqs, MANY + 1
    try:
        first = asyncio.create_task(model.rerank(request))
        await running(model, MANY // 4)
        with pytest.raises(Overloaded):
            await model.rerank(request)
        assert len((await first).results) == MANY
    finally:
        limits.max_num_queued_reqs = usual
    usual, limits.max_num_queued_tokens = limits.max_num_queued_tokens, MANY
    try:
        with pytest.raises(InvalidRequest, match=rf"^documents: .* at a time; {MANY} are admitted \(--max-waiting-tok"):
            await model.rerank(request)
    finally:
        limits.max_num_queued_tokens = usual


async def one_failure_is_all(model: Model, request: pb.RerankRequest) -> None:
    calls = 0

    async def fails_late(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == MANY // 2:
            await running(model, MANY // 4)
            raise RuntimeError("the engine choked on this one")
        return await pool(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "pool", fails_late)
        with pytest.raises(RuntimeError, match="choked"):
            await model.rerank(request)
    assert model.running_requests == 0


async def cannot_do_anything_else(model: Model) -> None:
    with pytest.raises(Unsupported, match="TokenClassify needs a token classifier"):
        await model.classify_tokens(pb.TokenClassifyRequest(text="a"))
    with pytest.raises(Unsupported, match="Predict needs a model that generates"):
        await model.predict(pb.PredictOptions(Prompt="a"))


async def test_all_documents_in_one_prompt(engines: Engines) -> None:
    folder, documents = ensure("listwise"), ["Paris", "Köln am Rhein", "", "東京"]
    model = await engines.get(Model=str(folder), MaxModelLen=toy.CONTEXT, Reranking=True)
    prompt = JinaRankingIOProcessorMixin.format_docs_prompts_func(QUERY, documents)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    weights = load_file(folder / "model.safetensors")
    qwen3 = Qwen3Model(Qwen3Config.from_pretrained(folder)).eval()
    qwen3.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    )
    first, second = (weights[f"projector.{layer}.weight"] for layer in (0, 2))
    with torch.inference_mode():
        vectors = torch.relu(qwen3(ids).last_hidden_state[0] @ first.T) @ second.T
    query = vectors[ids[0] == IDS[listwise.QUERY]]
    expected = torch.cosine_similarity(query, vectors[ids[0] == IDS[listwise.DOCUMENT]])

    result = await model.rerank(pb.RerankRequest(query=QUERY, documents=documents))
    scores = {each.index: each.relevance_score for each in result.results}
    assert [scores[index] for index in range(len(documents))] == pytest.approx(expected.tolist(), abs=1e-4)
    assert max(scores.values()) - min(scores.values()) > 0.01
    assert result.usage.prompt_tokens == ids.numel()
    with pytest.raises(InvalidRequest, match=r"^query with documents: .*2048 tokens"):
        await model.rerank(pb.RerankRequest(query=QUERY, documents=["Köln"] * 500))


async def test_a_model_that_generates_ranks_nothing(model: Model) -> None:
    with pytest.raises(Unsupported, match="Rerank needs a reranker"):
        await model.rerank(pb.RerankRequest(query=QUERY, documents=["a"]))
    with pytest.raises(Unsupported, match="TokenClassify needs a token classifier"):
        await model.classify_tokens(pb.TokenClassifyRequest(text="a"))
