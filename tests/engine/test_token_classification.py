"""TokenClassify on a real engine: the entities of `transformers`' pipeline on the same weights."""

import asyncio
from typing import Any

import pytest
from transformers import AutoTokenizer, BertForTokenClassification, TokenClassificationPipeline

from common.errors import InvalidRequest, Unsupported
from common.model import Model
from common.pb import backend_pb2 as pb
from tests.engine.conftest import Engines
from tests.engine.test_ranking import running
from tests.models import ensure
from tests.models.berts import CONTEXT, TEXT
from tests.unit.test_token_classification import TEXTS

FOLDER = "token_classifier"


@pytest.fixture
async def classifier(engines: Engines) -> Model:
    return await engines.get(Model=str(ensure("berts") / FOLDER), MaxModelLen=CONTEXT)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    folder = ensure("berts") / FOLDER
    return TokenClassificationPipeline(
        model=BertForTokenClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        aggregation_strategy="simple",
    )


async def test_entities(classifier: Model, pipeline: Any) -> None:
    texts = [*TEXTS, " " * 100_000 + "Jürgen in Köln", *TEXT.splitlines(), TEXT[:200]]
    responses = await asyncio.gather(
        *(classifier.classify_tokens(pb.TokenClassifyRequest(text=text)) for text in texts)
    )
    total = 0
    for text, response in zip(texts, responses, strict=True):
        expected = pipeline(text)
        total += len(expected)
        assert [(entity.entity_group, entity.start, entity.end) for entity in response.entities] == [
            (entity["entity_group"], len(text[: entity["start"]].encode()), len(text[: entity["end"]].encode()))
            for entity in expected
        ]
        scores = [entity["score"] for entity in expected]
        assert [entity.score for entity in response.entities] == pytest.approx(scores, abs=1e-4)
        for entity in response.entities:
            assert entity.text.encode() == text.encode()[entity.start : entity.end]
        threshold = 0.9
        above = await classifier.classify_tokens(pb.TokenClassifyRequest(text=text, threshold=threshold))
        assert list(above.entities) == [entity for entity in response.entities if entity.score >= threshold]
    assert total > 50


async def test_no_text_no_entities(classifier: Model) -> None:
    assert not (await classifier.classify_tokens(pb.TokenClassifyRequest(text=""))).entities


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan"), float("inf")])
async def test_thresholds(classifier: Model, threshold: float) -> None:
    with pytest.raises(InvalidRequest, match=r"^threshold: "):
        await classifier.classify_tokens(pb.TokenClassifyRequest(text="a", threshold=threshold))


async def test_the_context_is_the_limit(classifier: Model) -> None:
    fits = "a " * (CONTEXT - 2)
    assert (await classifier.classify_tokens(pb.TokenClassifyRequest(text=fits))) is not None
    for text, problem in (
        (f"{fits}a", "128 tokens"),
        ("Köln " * 10_000, "128 tokens"),
        ("a" * 2_000_001, "characters"),
    ):
        with pytest.raises(InvalidRequest, match=f"^text: .*{problem}") as refusal:
            await classifier.classify_tokens(pb.TokenClassifyRequest(text=text))
        assert "Köln" not in str(refusal.value)
    assert classifier.running_requests == 0


async def test_nobody_waits(classifier: Model) -> None:
    tasks = [
        asyncio.create_task(classifier.classify_tokens(pb.TokenClassifyRequest(text=TEXT[:200]))) for _ in range(300)
    ]
    await running(classifier, 1)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert classifier.running_requests == 0


async def test_it_can_do_nothing_else(classifier: Model) -> None:
    with pytest.raises(Unsupported, match=r"Rerank needs a reranker .*; the loaded model classifies tokens"):
        await classifier.rerank(pb.RerankRequest(query="q", documents=["a"]))
