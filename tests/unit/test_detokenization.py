"""Merged outputs taken apart again: the pieces are those of an engine whose every token was taken in time."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from common.detokenization import Piece, TokenByToken
from tests.parsers.tokenizer import encode, tokenizer_for

SPECIAL = ("<tool_call>", "</tool_call>")
TOKENIZER = tokenizer_for((), SPECIAL)
TEXT = 'Grüße 🎉 the weather <tool_call>\n{"name": "get_weather", "arguments": {"city": "東京"}}\n</tool_call> done'
PROMPT = "What is the weather?"


def outputs(splits: list[int], params: SamplingParams, *, stop_token: bool) -> list[RequestOutput]:
    """What vLLM's front end gives a consumer who takes `splits` tokens at a time."""
    prompt_ids = encode(TOKENIZER, PROMPT, ())
    answer = [*encode(TOKENIZER, TEXT, ()), *([TOKENIZER.eos_token_id] if stop_token else [])]
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt_ids, prompt_embeds=None, request_id="one")
    detokenizer = IncrementalDetokenizer.from_new_request(TOKENIZER, cast("Any", request))
    made: list[RequestOutput] = []
    pending: list[int] = []
    text = ""
    for position, token in enumerate(answer):
        ends = stop_token and position == len(answer) - 1
        stop_string = detokenizer.update([token], ends)
        finished = ends or stop_string is not None or position == len(answer) - 1
        text += detokenizer.get_next_output_text(finished, delta=True)
        pending.append(token)
        if finished or len(pending) == splits[len(made) % len(splits)]:
            reason = "stop" if ends or stop_string else "length"
            completion = CompletionOutput(
                0, text, pending, None, None, finish_reason=reason if finished else None, stop_reason=stop_string
            )
            made.append(RequestOutput("one", None, prompt_ids, None, [completion], finished))
            pending, text = [], ""
        if finished:
            break
    return made


def taken_apart(made: list[RequestOutput], params: SamplingParams) -> list[Piece]:
    pieces = TokenByToken(TOKENIZER, params, list(made[0].prompt_token_ids or []))
    return [piece for output in made for piece in pieces.pieces(output)]


@pytest.mark.parametrize("stop_token", [True, False])
@pytest.mark.parametrize("stop", [None, ["never said"], ["city", "done"], ["done"]])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(splits=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_pieces_are_those_of_single_tokens(
    stop_token: bool, stop: list[str] | None, skip_special_tokens: bool, splits: list[int]
) -> None:
    params = SamplingParams(stop=stop, skip_special_tokens=skip_special_tokens)
    single = taken_apart(outputs([1], params, stop_token=stop_token), params)
    assert all(len(token_ids) == 1 for _, token_ids, _ in single)
    assert [finished for _, _, finished in single] == [False] * (len(single) - 1) + [True]
    merged = outputs(splits, params, stop_token=stop_token)
    assert taken_apart(merged, params) == single
    assert "".join(text for text, _, _ in single) == "".join(output.outputs[0].text for output in merged)


def test_an_output_without_tokens_passes() -> None:
    completion = CompletionOutput(0, "tail", [], None, None, finish_reason="length")
    pieces = TokenByToken(TOKENIZER, SamplingParams(), [1])
    assert pieces.pieces(RequestOutput("one", None, [1], None, [completion], True)) == [("tail", [], True)]
