"""What the sampling fields mean once they reach the engine, zeros above all."""

from typing import Any

import pytest

from common.errors import InvalidRequest
from common.model import Model
from common.pb import backend_pb2 as pb
from tests.engine.conftest import MAX_MODEL_LEN, Engines
from tests.engine.wire import options, predict, stream
from tests.models.script import line

LONG = line("long")


async def test_temperature_zero_is_greedy_whatever_the_seed(model: Model) -> None:
    answers = {(await predict(model, options(LONG, Tokens=40, Seed=seed)))[0].message for seed in (1, 2, -1)}
    assert len(answers) == 1


async def test_seed_repeats_a_random_answer(model: Model) -> None:
    def request(seed: int) -> pb.PredictOptions:
        return pb.PredictOptions(Prompt="x", Temperature=2, Tokens=24, Seed=seed, IgnoreEOS=True)

    answers = [(await predict(model, request(seed)))[0].message for seed in (7, 7, 8)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("tokens", [0, -1])
async def test_tokens_unset_fill_the_context(model: Model, tokens: int) -> None:
    _, reply = await predict(model, options(LONG, Tokens=tokens, IgnoreEOS=True))
    assert reply.tokens + reply.prompt_tokens == MAX_MODEL_LEN


async def test_more_tokens_than_the_context_has_are_fine(model: Model) -> None:
    _, reply = await predict(model, options(LONG, Tokens=10 * MAX_MODEL_LEN, IgnoreEOS=True))
    assert reply.tokens + reply.prompt_tokens == MAX_MODEL_LEN


async def test_tokens_limit(model: Model) -> None:
    _, reply = await predict(model, options(LONG, Tokens=7))
    assert reply.tokens == 7


@pytest.mark.parametrize("field", ["TopP", "Penalty", "TopK", "MinP", "FrequencyPenalty", "PresencePenalty"])
async def test_zero_changes_nothing(model: Model, field: str) -> None:
    plain, _ = await predict(model, options(LONG, Tokens=40))
    zero, _ = await predict(model, options(LONG, Tokens=40, **{field: 0}))
    assert zero.message == plain.message


async def test_top_k_one_is_greedy_at_any_temperature(model: Model) -> None:
    greedy, _ = await predict(model, options(LONG, Tokens=40))
    top, _ = await predict(model, options(LONG, Tokens=40, Temperature=2, TopK=1, Seed=3))
    assert top.message == greedy.message


async def test_top_k_off_is_not_top_k_one(model: Model) -> None:
    request: dict[str, Any] = {"Prompt": "x", "Temperature": 2, "Tokens": 24, "Seed": 5, "IgnoreEOS": True}
    off, _ = await predict(model, pb.PredictOptions(TopK=0, **request))
    minus, _ = await predict(model, pb.PredictOptions(TopK=-1, **request))
    one, _ = await predict(model, pb.PredictOptions(TopK=1, **request))
    assert off.message == minus.message != one.message


async def test_stop_string_across_tokens_is_left_out(model: Model) -> None:
    whole, _ = await predict(model, options(LONG))
    stop = whole.message[50:62]
    stopped, _ = await predict(model, options(LONG, StopPrompts=["never said", stop]))
    streamed, _ = await stream(model, options(LONG, StopPrompts=["never said", stop]))
    assert stopped.message == whole.message[: whole.message.index(stop)]
    assert streamed.message == stopped.message


async def test_logit_bias_bans_a_token(model: Model) -> None:
    plain, _ = await predict(model, options(LONG, Tokens=1))
    (banned,) = (await model.tokenize(pb.PredictOptions(Prompt=plain.message))).tokens
    other, _ = await predict(model, options(LONG, Tokens=1, LogitBias=f'{{"{banned}": -100}}'))
    assert other.message != plain.message


async def test_repetition_penalty_changes_a_repetitive_answer(model: Model) -> None:
    plain, _ = await predict(model, options(LONG, Tokens=120))
    punished, _ = await predict(model, options(LONG, Tokens=120, Penalty=20))
    assert punished.message != plain.message


async def test_grammar_binds(model: Model) -> None:
    grammar = 'root ::= "yes" ws | "no" ws # an answer\nws ::= | " " ws'
    answer, _ = await predict(model, options(LONG, Grammar=grammar, Tokens=8))
    assert answer.message.strip() in ("yes", "no")


async def test_grammar_binds_all_that_follows_a_raw_prompt(thinking_model: Model) -> None:
    """Nobody parts a thought from such an answer, and none is waited for."""
    request = pb.PredictOptions(Prompt="The answer is", Grammar='root ::= "yes" | "no"', Tokens=8)
    answer, _ = await predict(thinking_model, request)
    streamed, _ = await stream(thinking_model, request)
    assert answer.message == streamed.message
    assert answer.message in ("yes", "no")


async def test_json_schema_binds(model: Model) -> None:
    schema = (
        '{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": false}'
    )
    request = options(LONG, Tokens=16)
    request.Metadata["json_schema"] = schema
    answer, _ = await predict(model, request)
    assert answer.message.replace(" ", "") in ('{"n":1}', '{"n":2}')


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"LogitBias": '{"99999": 1}'}, "LogitBias"),
        ({"TopLogprobs": 21}, "TopLogprobs"),
        ({"Prompt": "word " * 2 * MAX_MODEL_LEN}, "Prompt"),
    ],
)
async def test_what_only_the_engine_knows(model: Model, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        await predict(model, pb.PredictOptions(**{"Prompt": "x", **fields}))
    assert error.value.field == named


async def test_context_that_leaves_no_room_is_refused(model: Model) -> None:
    ids = (await model.tokenize(pb.PredictOptions(Prompt="a" * 4096))).tokens
    text = (await model.detokenize(pb.DetokenizeRequest(tokens=ids[:MAX_MODEL_LEN]))).content
    assert (await model.tokenize(pb.PredictOptions(Prompt=text))).length == MAX_MODEL_LEN
    with pytest.raises(InvalidRequest, match="must leave one for the answer"):
        await predict(model, pb.PredictOptions(Prompt=text))


async def test_the_first_request_of_a_bfloat16_engine_may_be_one_token(engines: Engines) -> None:
    model = await engines.get("tool_parser:none", "reasoning_parser:none", DType="bfloat16")
    _, reply = await predict(model, pb.PredictOptions(Prompt="a", Tokens=5, IgnoreEOS=True))
    assert (reply.prompt_tokens, reply.tokens) == (1, 5)
