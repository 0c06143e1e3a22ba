"""Adapters on a real engine: what they change, for whom, and how a load that can't use one ends."""

import asyncio
import json
import math
from pathlib import Path

import pytest
import torch
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from common.engine_log import StageClock
from common.errors import InvalidRequest, LoadFailed
from common.model import Model, plan_load
from common.pb import backend_pb2 as pb
from common.processes import engine_processes, kill
from tests.engine.conftest import MAX_MODEL_LEN, Engines
from tests.engine.wire import options, predict, stream
from tests.models import ensure, training
from tests.models.adapters import ANSWERS, QUESTION

SCALE = 0.25


def adapter(name: str) -> Path:
    return ensure("adapters") / name


@pytest.fixture
async def adapted(engines: Engines) -> Model:
    """The scripted model with three adapters, none of them the default, the last a weak copy of the first."""
    lyon = adapter("lyon")
    return await engines.get(
        "reasoning_parser:none",
        LoraAdapters=[str(lyon), str(adapter("berlin")), f"weak={lyon}"],
        LoraScales=[1, 0, SCALE],
    )


@pytest.mark.parametrize(("name", "answer"), [*ANSWERS.items(), ("", QUESTION.content), ("none", QUESTION.content)])
async def test_a_request_picks_its_adapter(adapted: Model, name: str, answer: str) -> None:
    request = options(QUESTION)
    request.Metadata["lora"] = name
    whole, _ = await predict(adapted, request)
    streamed, _ = await stream(adapted, request)
    assert whole.message == streamed.message == answer


async def test_all_at_once(adapted: Model) -> None:
    names = [*ANSWERS, "none"] * 8
    requests = [options(QUESTION, Metadata={"lora": name}) for name in names]
    answers = await asyncio.gather(*(predict(adapted, request) for request in requests))
    assert [answer.message for answer, _ in answers] == [ANSWERS.get(name, QUESTION.content) for name in names]


async def test_a_raw_prompt_has_one_too(adapted: Model) -> None:
    prompt = training.prompt_of(ensure("scripted"), QUESTION.messages)
    answer, _ = await predict(adapted, pb.PredictOptions(Prompt=prompt, Tokens=60, Metadata={"lora": "lyon"}))
    assert answer.message == ANSWERS["lyon"]


@pytest.mark.parametrize(("name", "scale"), [("none", 0.0), ("weak", SCALE), ("lyon", 1.0)])
async def test_a_scale_weakens_as_much_as_it_says(adapted: Model, name: str, scale: float) -> None:
    request = options(QUESTION, Tokens=1, Logprobs=20, TopLogprobs=20, Metadata={"lora": name})
    _, reply = await predict(adapted, request)
    prompt = training.prompt_of(ensure("scripted"), QUESTION.messages)
    expected = training.next_logprobs(ensure("scripted"), prompt, adapter=adapter("lyon"), scale=scale)
    (entry,) = json.loads(reply.logprobs)["content"]
    for top in entry["top_logprobs"]:
        assert math.isclose(top["logprob"], float(expected[top["id"]]), abs_tol=2e-3)


async def test_an_unknown_adapter_is_refused_with_those_there_are(adapted: Model) -> None:
    with pytest.raises(InvalidRequest, match="use lyon, berlin, weak, none for the base model"):
        await adapted.predict(options(QUESTION, Metadata={"lora": "paris"}))


async def test_the_only_adapter_is_the_default(engines: Engines) -> None:
    model = await engines.get("reasoning_parser:none", LoraAdapter=str(adapter("lyon")))
    assert (await predict(model, options(QUESTION)))[0].message == ANSWERS["lyon"]
    assert (await predict(model, options(QUESTION, Metadata={"lora": "none"})))[0].message == QUESTION.content


async def test_scores_are_those_of_the_default(engines: Engines) -> None:
    model = await engines.get("reasoning_parser:none", LoraAdapter=str(adapter("lyon")))
    prompt, candidate = training.prompt_of(ensure("scripted"), QUESTION.messages), ANSWERS["lyon"]
    tokenizer, adapted = training.loaded(ensure("scripted"), adapter("lyon"))
    before, after = tokenizer.encode(prompt), tokenizer.encode(candidate)
    with torch.no_grad():
        logits = adapted(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    wanted = torch.log_softmax(logits, dim=-1)[range(len(after)), after]
    (score,) = (await model.score(pb.ScoreRequest(prompt=prompt, candidates=[candidate]))).candidates
    assert math.isclose(score.log_prob, float(wanted.sum()), abs_tol=1e-3)


async def test_an_adapter_of_another_model_fails_the_load(engines: Engines, tmp_path: Path) -> None:
    await engines.close()
    config = json.loads((adapter("lyon") / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights = (adapter("lyon") / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights.replace(b"q_proj", b"x_proj"))
    wire = pb.ModelOptions(
        Model=str(ensure("scripted")), DType="float32", MaxModelLen=MAX_MODEL_LEN, LoraAdapter=f"odd={tmp_path}"
    )
    with pytest.raises(LoadFailed, match=r"'odd' can't be loaded: .*x_proj"):
        await Model.load(plan_load(wire), StageClock(lambda _stage, _seconds: None))


async def test_an_engine_that_dies_while_it_loads_one_fails_the_load(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engines.close()
    add_lora = AsyncLLM.add_lora

    async def add_to_a_dying_one(llm: AsyncLLM, request: LoRARequest) -> bool:
        for process in engine_processes():
            process.suspend()
        asking = asyncio.ensure_future(add_lora(llm, request))
        await asyncio.sleep(0.2)
        await kill(engine_processes())
        return bool(await asking)

    monkeypatch.setattr(AsyncLLM, "add_lora", add_to_a_dying_one)
    wire = pb.ModelOptions(
        Model=str(ensure("scripted")), DType="float32", MaxModelLen=MAX_MODEL_LEN, LoraAdapter=str(adapter("lyon"))
    )
    async with asyncio.timeout(30):
        with pytest.raises(LoadFailed, match="was killed"):
            await Model.load(plan_load(wire), StageClock(lambda _stage, _seconds: None))
    assert engine_processes() == []
