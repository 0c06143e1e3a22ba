import dataclasses
import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import InvalidRequest, Unsupported
from common.probes import Probe, Replay, RowReplay, Step, Tokens
from common.score_plan import Plan, Scoring

ANY = Scoring(context=10_000)
REPLAYS = dataclasses.replace(ANY, steps=False)
STEPS = dataclasses.replace(ANY, replay=None)
CONTEXT: Tokens = (7, 8, 9)


def config(**changes: Any) -> Any:
    """Of an engine as vLLM loads it, but for the changed values."""
    values: dict[str, Any] = {
        "is_diffusion": False,
        "logprobs_mode": "raw_logprobs",
        "max_logprobs": 20,
        "max_model_len": 100,
        "get_vocab_size": lambda: 1000,
        "enable_prefix_caching": True,
        "block_size": 16,
        "kv_sharing_fast_prefill": False,
        "max_num_queued_reqs": 10,
        "max_num_queued_tokens": 1000,
        "max_num_batched_tokens": 2048,
        "use_v2_model_runner": False,
        "speculative_config": None,
        "lora_config": None,
    }
    section = SimpleNamespace(**values | changes)
    return SimpleNamespace(
        model_config=section,
        cache_config=section,
        scheduler_config=section,
        use_v2_model_runner=section.use_v2_model_runner,
        speculative_config=section.speculative_config,
        lora_config=section.lora_config,
    )


def told(probe: Probe) -> list[tuple[Tokens, int]]:
    """(what comes before, the token) of each log-probability that a probe reads."""
    if isinstance(probe, Step):
        return [((*probe.context, *probe.before), probe.token)]
    assert isinstance(probe, Replay)
    whole = (*probe.context, *probe.candidate)
    return [(whole[:index], whole[index]) for index in range(len(probe.context), len(whole))]


def check(plan: Plan, candidates: list[Tokens]) -> None:
    """Every token of every candidate is read where the plan says, behind what comes before it."""
    for candidate, places in zip(candidates, plan.places, strict=True):
        read = [told(plan.probes[probe])[index] for probe, index in places]
        assert read == [((*CONTEXT, *candidate[:index]), token) for index, token in enumerate(candidate)]
    assert {probe for places in plan.places for probe, _ in places} == set(range(len(plan.probes)))


@pytest.mark.parametrize("scoring", [ANY, REPLAYS, STEPS, dataclasses.replace(ANY, block=4)])
def test_every_token_is_read_in_its_place(scoring: Scoring) -> None:
    generator = random.Random(11)
    for _ in range(200):
        candidates = [
            tuple(generator.choices(range(3), k=generator.randint(1, 5))) for _ in range(generator.randint(1, 8))
        ]
        check(scoring.plan(CONTEXT, candidates), candidates)


def test_what_is_alike_is_asked_once() -> None:
    candidates: list[Tokens] = [(1, 2, 3), (1,), (1, 2, 3), (1, 2), (4,)]
    assert [told(probe)[-1] for probe in REPLAYS.plan(CONTEXT, candidates).probes] == [
        ((*CONTEXT, 1, 2), 3),
        (CONTEXT, 4),
    ]
    assert len(STEPS.plan(CONTEXT, candidates).probes) == 4


def work(plan: Plan, block: int | None) -> int:
    """Tokens that an engine computes which keeps the full blocks of each prompt for all that follow."""
    cached: set[Tokens] = set()
    computed = 0
    for probe in plan.probes:
        ids = tuple(probe.token_ids)
        hit = 0
        if isinstance(probe, Step) and block is not None:
            ends = range(block, len(ids), block)
            hit = max((end for end in ends if ids[:end] in cached), default=0)
            cached |= {ids[:end] for end in range(block, len(ids) + 1, block)}
        computed += len(ids) - hit
    return computed


def test_the_cheaper_way_is_taken() -> None:
    generator = random.Random(5)
    kinds = set()
    for block, prompt, count, length in itertools.product((None, 4, 16), (3, 20, 200), (1, 4), (1, 2, 9)):
        context = tuple(range(prompt))
        candidates = [tuple(generator.choices(range(50), k=length)) for _ in range(count)]
        both, replays, steps = (
            dataclasses.replace(scoring, block=block).plan(context, candidates) for scoring in (ANY, REPLAYS, STEPS)
        )
        assert work(both, block) == min(work(replays, block), work(steps, block))
        kinds.add(type(both.probes[0]))
    assert kinds == {Replay, Step}


def test_what_does_not_fit_is_named() -> None:
    scoring = Scoring(context=8)
    assert scoring.plan(CONTEXT, [(1, 2, 3, 4)])
    with pytest.raises(InvalidRequest, match=r"candidates\[1\]: has 5 tokens; the context of 8 leaves 4 behind"):
        scoring.plan(CONTEXT, [(1,), (1, 2, 3, 4, 5)])
    with pytest.raises(InvalidRequest, match=r"prompt: has 7 tokens; the context of 8 leaves none"):
        scoring.plan((0,) * 7, [(1,)])


def test_more_than_is_ever_admitted_is_refused() -> None:
    candidates = [(token,) for token in range(11)]
    with pytest.raises(InvalidRequest, match=r"candidates: these 11 make 11 requests with 33 tokens.*10 requests"):
        Scoring(context=100, requests=10).plan(CONTEXT, candidates)
    with pytest.raises(InvalidRequest, match=r"candidates: .*30 tokens \(--max-waiting-tokens\)"):
        Scoring(context=100, tokens=30).plan(CONTEXT, candidates)


def test_the_dearer_way_is_taken_where_only_that_is_admitted() -> None:
    candidates = [tuple(range(20 * index, 20 * index + 5)) for index in range(3)]
    scoring = Scoring(context=5000, block=16)
    context = tuple(range(1000))
    assert isinstance(scoring.plan(context, candidates).probes[0], Step)
    assert isinstance(dataclasses.replace(scoring, requests=14).plan(context, candidates).probes[0], Replay)


def test_the_memory_of_a_replay_is_bounded() -> None:
    # 1 GiB for three float32 of each of 100,000 tokens.
    scoring = Scoring.of(config(get_vocab_size=lambda: 100_000, enable_prefix_caching=False, max_model_len=5000))
    assert scoring.rows == 894
    scoring = dataclasses.replace(scoring, requests=None, tokens=None)
    candidate = tuple(range(20))
    assert isinstance(scoring.plan(tuple(range(874)), [candidate]).probes[0], Replay)
    assert isinstance(scoring.plan(tuple(range(875)), [candidate]).probes[0], Step)
    with pytest.raises(InvalidRequest, match=r"prompt: has 895 tokens with the longest candidate.*at most 894"):
        dataclasses.replace(scoring, steps=False).plan(tuple(range(875)), [candidate])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (Replay, None, True, 16)),
        ({"enable_prefix_caching": False}, (Replay, None, True, None)),
        ({"use_v2_model_runner": True, "get_vocab_size": lambda: 10**6}, (RowReplay, None, True, 16)),
        ({"use_v2_model_runner": True, "max_logprobs": 0}, (Replay, None, True, 16)),
        ({"kv_sharing_fast_prefill": True}, (None, None, True, 16)),
        ({"lora_config": object()}, (None, None, True, 16)),
        ({"speculative_config": object()}, (Replay, None, False, 16)),
        ({"logprobs_mode": "processed_logprobs"}, (Replay, None, False, 16)),
        ({"get_vocab_size": lambda: 10**5, "max_num_batched_tokens": 512}, (Replay, None, True, 16)),
    ],
)
def test_what_an_engine_can_be_asked(changes: Any, expected: Any) -> None:
    scoring = Scoring.of(config(**changes))
    assert (scoring.replay, scoring.rows, scoring.steps, scoring.block) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_diffusion": True}, "diffusion"),
        ({"logprobs_mode": "raw_logits"}, "logprobs_mode raw_logits"),
        ({"logprobs_mode": "processed_logits"}, "logprobs_mode processed_logits"),
        ({"kv_sharing_fast_prefill": True, "speculative_config": object()}, "kv_sharing_fast_prefill"),
        ({"lora_config": object(), "speculative_config": object()}, "LoRA adapters"),
        ({"kv_sharing_fast_prefill": True, "logprobs_mode": "processed_logprobs"}, "kv_sharing_fast_prefill"),
    ],
)
def test_an_engine_that_tells_no_log_probabilities(changes: Any, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        Scoring.of(config(**changes))
