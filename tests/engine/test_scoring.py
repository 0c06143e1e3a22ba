"""Scores of a real engine against a forward pass of `transformers` on the same weights, whatever the cache holds."""

import asyncio
import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaForCausalLM
from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

from common.errors import InvalidRequest, Overloaded, Unsupported
from common.model import Model
from common.pb import backend_pb2 as pb
from common.scoring import Scorer
from tests.engine.conftest import MAX_MODEL_LEN, Engines
from tests.engine.wire import options, predict
from tests.models import ensure
from tests.models.script import line, script
from tests.models.training import prompt_of

TOLERANCE = 1e-3
LABELS = ["yes<|im_end|>", "no<|im_end|>", "maybe", "not today", "not", "東京<|im_end|>", "😀", "not"]


@cache
def reference() -> tuple[Any, Any]:
    folder = ensure("scripted")
    return AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids(text: str) -> list[int]:
    tokenizer, _ = reference()
    return list(tokenizer.encode(text, add_special_tokens=False))


@cache
def expected(prompt: str, candidate: str) -> list[float]:
    """The log-probability of each token of `candidate` behind `prompt`, tokenised apart."""
    _, model = reference()
    before, after = ids(prompt), ids(candidate)
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return [float(value) for value in torch.log_softmax(logits, dim=-1)[range(len(after)), after]]


def request(prompt: str, candidates: Sequence[str], **fields: Any) -> pb.ScoreRequest:
    return pb.ScoreRequest(prompt=prompt, candidates=candidates, include_token_logprobs=True, **fields)


async def check(model: Model, prompt: str, candidates: Sequence[str]) -> None:
    response = await model.score(request(prompt, candidates, length_normalize=True))
    assert len(response.candidates) == len(candidates)
    for candidate, score in zip(candidates, response.candidates, strict=True):
        wanted = expected(prompt, candidate)
        assert score.num_tokens == len(wanted) == len(score.tokens) > 0
        assert [token.log_prob for token in score.tokens] == pytest.approx(wanted, abs=TOLERANCE)
        assert score.log_prob == pytest.approx(sum(wanted), abs=TOLERANCE)
        assert score.length_normalized_log_prob == pytest.approx(sum(wanted) / len(wanted), abs=TOLERANCE)
        assert "".join(token.token for token in score.tokens) == candidate


def prompts() -> list[str]:
    """Of each script line that is a plain chat, of a few tokens to most of the context."""
    texts = [prompt_of(ensure("scripted"), it.messages) for it in script() if it.messages and not it.tools]
    long = prompt_of(ensure("scripted"), [{"role": "user", "content": "What is the capital of France? " * 60}])
    return [*texts[:9], long]


def pairs() -> list[tuple[str, list[str]]]:
    """Ten prompts with ten candidates each: answers of the script, labels, and text of all alphabets."""
    generator = random.Random(1869)
    answers = [it.answer + "<|im_end|>" for it in script() if it.messages and len(it.answer) < 100]
    return [(prompt, generator.sample(answers, 4) + generator.sample(LABELS, 6)) for prompt in prompts()]


async def test_a_hundred_pairs_agree_with_transformers(model: Model) -> None:
    assert sum(len(candidates) for _, candidates in pairs()) == 100
    for prompt, candidates in pairs():
        await check(model, prompt, candidates)


async def test_whatever_the_prefix_cache_holds(model: Model) -> None:
    for prompt, _ in pairs():
        await predict(model, pb.PredictOptions(Prompt=prompt, Tokens=20))
    # Once behind a cache full of the same prompts, and once behind one with the candidates, too.
    for _ in range(2):
        await asyncio.gather(*(check(model, prompt, candidates) for prompt, candidates in pairs()))


def scorer(model: Model) -> Scorer:
    assert model._scorer is not None
    return model._scorer


def force(model: Model, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Have the model's scores asked for in one way, or with other limits."""
    monkeypatch.setattr(scorer(model), "_scoring", dataclasses.replace(scorer(model)._scoring, **changes))


@pytest.mark.parametrize("change", [{"steps": False}, {"replay": None}], ids=["replays", "steps"])
async def test_both_ways_tell_the_same(model: Model, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    force(model, monkeypatch, **change)
    for prompt, candidates in pairs()[-3:]:
        await check(model, prompt, candidates)


def counter(name: str) -> int:
    (found,) = [metric for metric in get_metrics_snapshot() if metric.name == name]
    assert isinstance(found, Counter)
    return int(found.value)


async def test_steps_share_the_blocks_of_a_prompt_that_nobody_asked_before(model: Model) -> None:
    block = scorer(model)._scoring.block
    assert block
    prompt = "A prompt of its own. " * 70
    blocks = (len(ids(prompt)) - 1) // block
    assert blocks >= 2
    hits = counter("vllm:prefix_cache_hits")
    labels = [*"abcdefghijkl"]
    await check(model, prompt, labels)
    assert counter("vllm:prefix_cache_hits") - hits >= (len(labels) - 1) * blocks * block


async def test_tokens_do_not_span_the_boundary(model: Model) -> None:
    prompt, candidate = "The capital of Fr", "ance is Paris."
    assert ids(prompt) + ids(candidate) != ids(prompt + candidate)
    await check(model, prompt, [candidate])


async def test_beginnings_and_duplicates(model: Model) -> None:
    prompt = prompts()[0]
    await check(model, prompt, ["The capital", "The", "The capital", "The capital of France", "The"])


async def test_only_what_is_asked_for(model: Model) -> None:
    (score,) = (await model.score(pb.ScoreRequest(prompt="a", candidates=["b c"]))).candidates
    assert score.log_prob < 0
    assert score.num_tokens > 0
    assert (score.length_normalized_log_prob, len(score.tokens)) == (0, 0)


@pytest.mark.parametrize("hint", [-1, 1, 20, 2**31 - 1])
async def test_the_hint_changes_nothing(model: Model, hint: int) -> None:
    plain = await model.score(request(prompts()[0], LABELS))
    hinted = await model.score(request(prompts()[0], LABELS, stable_prefix_len=hint))
    for one, other in zip(plain.candidates, hinted.candidates, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


@pytest.mark.parametrize(
    ("prompt", "candidates", "message"),
    [
        ("a", [], "candidates: is empty"),
        ("a", ["b", ""], r"candidates\[1\]: has no token"),
        ("", ["b"], "prompt: has no token"),
        ("<|im_end|>" * (MAX_MODEL_LEN - 1), ["b"], f"prompt: has {MAX_MODEL_LEN - 1} tokens"),
        ("<|im_end|>" * (MAX_MODEL_LEN - 3), ["b", "<|im_end|>" * 3], r"candidates\[1\]: has 3 tokens.*leaves 2"),
        ("a" * 3_000_000, ["b"], "prompt, candidates: have 3000001 characters"),
        ("a", ["b"] * 100_000, "candidates: has 100000; no more than"),
    ],
)
async def test_what_can_not_be_scored(model: Model, prompt: str, candidates: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        await model.score(pb.ScoreRequest(prompt=prompt, candidates=candidates))
    assert model.running_requests == 0


async def test_as_long_as_the_context(model: Model) -> None:
    # vLLM takes no prompt that fills the context: one token is left.
    await check(model, "<|im_end|>" * (MAX_MODEL_LEN - 3), ["<|im_end|>" * 2])


async def test_more_than_is_admitted_now(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = model._engine.llm.vllm_config.scheduler_config
    monkeypatch.setattr(limits, "max_num_queued_reqs", 4)
    force(model, monkeypatch, requests=4)
    three = request("a", ["b", "c", "d"])
    with pytest.raises(InvalidRequest, match="no more than 4 requests"):
        await model.score(request("a", [*"bcdef"]))
    others = [asyncio.create_task(model.predict(options(line("long"), IgnoreEOS=True))) for _ in range(2)]
    async with asyncio.timeout(10):
        while model.running_requests < 2:  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="try again later"):
        await model.score(three)
    for other in others:
        other.cancel()
    await asyncio.wait(others)
    assert len((await model.score(three)).candidates) == 3


@pytest.mark.parametrize("change", [{"steps": False}, {"replay": None}], ids=["replays", "steps"])
@pytest.mark.parametrize("running", [0, 1, 8])
async def test_nothing_runs_on_for_a_caller_who_went_away(
    model: Model, change: Any, running: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(model, monkeypatch, **change)
    task = asyncio.create_task(model.score(request("Count. " * 80, [f"{number} " * 30 for number in range(10)])))
    async with asyncio.timeout(20):
        while model.running_requests < running:  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert model.running_requests == 0


async def test_others_keep_their_alternatives_meanwhile(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    force(model, monkeypatch, replay=None)
    asked = options(line("long"), Tokens=150, Logprobs=5, TopLogprobs=5)
    answers = [asyncio.create_task(predict(model, asked)) for _ in range(4)]
    rounds = 0
    while not all(answer.done() for answer in answers):
        await check(model, *pairs()[0])
        rounds += 1
    assert rounds > 1
    for answer, reply in await asyncio.gather(*answers):
        assert line("long").content.startswith(answer.message)
        for entry in json.loads(reply.logprobs)["content"]:
            assert len({top["id"] for top in entry["top_logprobs"]}) == 5
            assert all(top["logprob"] > -1000 for top in entry["top_logprobs"])


async def test_an_engine_that_dies_of_replays_is_not_asked_for_any(engines: Engines, tmp_path: Path) -> None:
    # Its tokenizer begins each text with a token and ends it with another, as those of many models do.
    folder = shutil.copytree(ensure("scripted"), tmp_path / "scripted")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin, end = "<|endoftext|>", "<|im_end|>"
    numbers = [(token, tokenizer.token_to_id(token)) for token in (begin, end)]
    tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=numbers)
    tokenizer.save(str(folder / "tokenizer.json"))
    model = await engines.get(
        "reasoning_parser:none",
        Model=str(folder),
        EngineArgs=json.dumps({"kv_sharing_fast_prefill": True}),
        DisableLogStatus=True,
    )
    assert scorer(model)._scoring.replay is None
    wanted = {label: sum(expected(begin + "Yes or no?", label)) for label in LABELS}
    for prompt in ("Yes or no?", begin + "Yes or no?"):
        response = await model.score(request(prompt, LABELS))
        for label, score in zip(LABELS, response.candidates, strict=True):
            assert score.log_prob == pytest.approx(wanted[label], abs=TOLERANCE)
    assert not model.dead
    with pytest.raises(Unsupported, match="DisableLogStatus"):
        await model.metrics()
