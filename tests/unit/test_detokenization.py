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


SPLITS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@pytest.mark.parametrize("stop_token", [True, False])
@pytest.mark.parametrize("stop", [None, ["never said"], ["\0"]])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(splits=SPLITS)
def test_pieces_are_those_of_single_tokens(
    stop_token: bool, stop: list[str] | None, skip_special_tokens: bool, splits: list[int]
) -> None:
    """Each with its text, however much of it is held back for stop strings."""
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    made = outputs([1], params, stop_token=stop_token)
    single = [(it.outputs[0].text, list(it.outputs[0].token_ids), it.finished) for it in made]
    assert [finished for _, _, finished in single] == [False] * (len(single) - 1) + [True]
    params.stop = stop
    assert taken_apart(outputs(splits, params, stop_token=stop_token), params) == single


@pytest.mark.parametrize("stop", ["T", "done", "ity", "<tool", "l_call>", '"}}\n<', "🎉"])
@given(splits=SPLITS)
def test_a_token_whose_text_is_cut_is_left_out(stop: str, splits: list[int]) -> None:
    params = SamplingParams(skip_special_tokens=False)
    whole = taken_apart(outputs([1], params, stop_token=False), params)
    params.stop = [stop]
    pieces = taken_apart(outputs(splits, params, stop_token=False), params)
    assert "".join(text for text, _, _ in pieces) == TEXT.partition(stop)[0]
    assert [finished for _, _, finished in pieces] == [False] * (len(pieces) - 1) + [True]
    *before, (rest, token_ids, _) = pieces
    assert before == whole[: len(before)]
    text, own, _ = whole[len(before)]
    assert (rest, token_ids) == (text, own) or (token_ids == [] and text.startswith(rest) and text != rest)


def test_an_output_without_tokens_passes() -> None:
    completion = CompletionOutput(0, "tail", [], None, None, finish_reason="length")
    pieces = TokenByToken(TOKENIZER, SamplingParams(), [1])
    assert pieces.pieces(RequestOutput("one", None, [1], None, [completion], True)) == [("tail", [], True)]
