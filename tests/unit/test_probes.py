from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.logprobs import FlatLogprobs, Logprob
from vllm.sampling_params import RequestOutputKind

from common.pb import backend_pb2 as pb
from common.probes import Probe, Replay, RowReplay, Step
from common.request import generation_request

REPLAY = Replay((5, 6), (7, 8))
ROWS = RowReplay((5, 6), (7, 8))
STEP = Step((5, 6), (7,), 8)


@pytest.mark.parametrize("probe", [REPLAY, ROWS, STEP])
def test_all_ask_for_one_token_without_text(probe: Probe) -> None:
    params = probe.params
    assert (params.max_tokens, params.temperature, params.detokenize) == (1, 0, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY


@pytest.mark.parametrize(("probe", "skips"), [(REPLAY, True), (ROWS, True), (STEP, False)])
def test_a_replay_never_reads_the_prefix_cache(probe: Probe, skips: bool) -> None:
    # One that did would end the engine: vLLM fills the rows that it has not computed with what memory holds.
    assert probe.params.skip_reading_prefix_cache is skips


@pytest.mark.parametrize("chat", [False, True])
def test_no_field_of_the_wire_reaches_what_ends_the_engine(chat: bool) -> None:
    names = ("skip_reading_prefix_cache", "prompt_logprobs", "vllm_xargs", "chat_template_kwargs", "extra_args")
    values = ("false", "0", '{"skip_reading_prefix_cache": false}', '{"skip_reading_prefix_cache": false}', "{}")
    options = pb.PredictOptions(
        Prompt="x",
        UseTokenizerTemplate=chat,
        Messages=[pb.Message(role="user", content="x")],
        Metadata=dict(zip(names, values, strict=True)),
        Logprobs=5,
        TopLogprobs=5,
    )
    request = generation_request(options, stream=False, has_tool_parser=False)
    params = request.openai.to_sampling_params(5, {})
    assert isinstance(params, SamplingParams)
    assert params.prompt_logprobs is None
    assert params.prompt_logprob_token_ids is None
    assert params.skip_reading_prefix_cache is False  # as vLLM sets it where no prompt is scored
    assert not params.extra_args


def test_the_wire_has_no_such_field() -> None:
    assert set(pb.ScoreRequest.DESCRIPTOR.fields_by_name) == {
        "prompt",
        "candidates",
        "include_token_logprobs",
        "length_normalize",
        "ModelIdentity",
        "stable_prefix_len",
    }


def output(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


def test_a_replay_reads_by_token_id_and_not_the_first_entry() -> None:
    assert REPLAY.token_ids == [5, 6, 7, 8]
    entries = FlatLogprobs()
    entries.append(None)  # nothing comes before the first token
    entries.append({6: Logprob(-9.0)})
    entries.append({1: Logprob(-0.1), 7: Logprob(-1.0)})
    entries.append({8: Logprob(-2.0), 1: Logprob(-0.2)})
    assert REPLAY.read(output(prompt_logprobs=entries)) == [-1.0, -2.0]


def test_rows_of_a_replay_begin_with_the_candidate() -> None:
    params = ROWS.params
    # Row i tells of the token at start + i + 1, and there are as many as vLLM demands.
    assert params.prompt_logprob_start == 1
    assert params.prompt_logprob_token_ids == [[7], [8]]
    assert len(params.prompt_logprob_token_ids) == len(ROWS.token_ids) - 1 - params.prompt_logprob_start
    scores = np.array([[-1.0], [-2.0]], dtype=np.float32)
    assert ROWS.read(output(prompt_token_id_logprobs=scores)) == [-1.0, -2.0]


def test_a_step_may_sample_nothing_else() -> None:
    assert STEP.token_ids == [5, 6, 7]
    assert STEP.params.allowed_token_ids == [8]
    assert STEP.params.logprobs == 0
    assert STEP.params.ignore_eos
    sampled = output(logprobs=[{8: Logprob(-2.0)}])
    assert STEP.read(output(outputs=[sampled])) == [-2.0]
