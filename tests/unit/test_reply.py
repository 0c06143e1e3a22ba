"""The shape of replies, to the letter: what each endpoint of the orchestrator reads."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.pb import backend_pb2 as pb
from common.reply import Completion, Delta, ToolCall, Usage, chunk, joined, last_chunk, whole

USAGE = Usage(prompt_tokens=7, completion_tokens=3, prompt_ms=12.5, generation_ms=80.25)
ENTRY = '{"id":5,"token":"é","bytes":[195,169],"logprob":-0.5,"top_logprobs":[]}'


def set_fields(message: Any) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}


def test_a_text_chunk() -> None:
    reply = chunk(Delta(content="héllo"), USAGE)
    assert reply == pb.Reply(
        message="héllo".encode(), chat_deltas=[pb.ChatDelta(content="héllo")], tokens=3, prompt_tokens=7
    )


def test_a_reasoning_chunk_has_no_message() -> None:
    reply = chunk(Delta(reasoning="because"), USAGE)
    assert reply == pb.Reply(
        message=b"", chat_deltas=[pb.ChatDelta(reasoning_content="because")], tokens=3, prompt_tokens=7
    )


def test_a_tool_chunk_has_no_message() -> None:
    fragments = [ToolCall(0, "call_1", "clock"), ToolCall(0, arguments='{"a"')]
    reply = chunk(Delta(tool_calls=fragments), USAGE)
    assert reply == pb.Reply(
        message=b"",
        chat_deltas=[
            pb.ChatDelta(
                tool_calls=[
                    pb.ToolCallDelta(index=0, id="call_1", name="clock"),
                    pb.ToolCallDelta(index=0, arguments='{"a"'),
                ]
            )
        ],
        tokens=3,
        prompt_tokens=7,
    )


@pytest.mark.parametrize(
    "delta", [Delta(content="x"), Delta(reasoning="x"), Delta(tool_calls=[ToolCall(1, arguments="x")])], ids=str
)
def test_no_chunk_but_the_last_has_times_or_logprobs(delta: Delta) -> None:
    assert {"timing_prompt_processing", "timing_token_generation", "logprobs", "audio"}.isdisjoint(
        set_fields(chunk(delta, USAGE))
    )


def test_the_last_chunk_carries_totals_and_nothing_else() -> None:
    assert set_fields(last_chunk(USAGE, [])) == {
        "tokens": 3,
        "prompt_tokens": 7,
        "timing_prompt_processing": 12.5,
        "timing_token_generation": 80.25,
    }


def test_counts_are_those_of_the_moment() -> None:
    usage = Usage(prompt_tokens=7)
    counts = []
    for _ in range(3):
        usage.completion_tokens += 2
        counts.append(chunk(Delta(content="x"), usage).tokens)
    assert counts == [2, 4, 6]


def test_logprobs_are_json_that_other_languages_read() -> None:
    assert json.loads(last_chunk(USAGE, [ENTRY, ENTRY]).logprobs) == {"content": [json.loads(ENTRY)] * 2}
    assert last_chunk(USAGE, []).logprobs == b""


def test_a_whole_answer() -> None:
    calls = [ToolCall(0, "a", "clock", "{}"), ToolCall(1, "b", "clock", '{"x": 1}')]
    assert whole(Completion("text", "thought", calls, USAGE, [ENTRY])) == pb.Reply(
        message=b"text",
        chat_deltas=[
            pb.ChatDelta(
                content="text",
                reasoning_content="thought",
                tool_calls=[
                    pb.ToolCallDelta(index=0, id="a", name="clock", arguments="{}"),
                    pb.ToolCallDelta(index=1, id="b", name="clock", arguments='{"x": 1}'),
                ],
            )
        ],
        tokens=3,
        prompt_tokens=7,
        timing_prompt_processing=12.5,
        timing_token_generation=80.25,
        logprobs=f'{{"content":[{ENTRY}]}}'.encode(),
    )


def test_a_whole_answer_without_anything() -> None:
    reply = whole(Completion("", "", [], Usage(), []))
    assert reply.message == b""
    assert reply.chat_deltas == [pb.ChatDelta()]


def test_half_a_surrogate_pair_in_arguments_is_no_failure() -> None:
    # A model may write `\ud83d` alone, which parsers decode.
    calls = [ToolCall(0, "a", "clock", '{"x": "\ud83d"}')]
    for reply in (chunk(Delta(tool_calls=calls), USAGE), whole(Completion("", "", calls, USAGE, []))):
        (call,) = reply.chat_deltas[0].tool_calls
        assert call.arguments.startswith('{"x": "')


TEXT = st.text(min_size=1)


@given(st.lists(st.builds(Delta, content=TEXT) | st.builds(Delta, reasoning=TEXT)))
def test_what_endpoints_put_together_is_the_same(deltas: list[Delta]) -> None:
    replies = [*(chunk(delta, USAGE) for delta in deltas), last_chunk(USAGE, [])]
    content = "".join(delta.content for delta in deltas)
    assert b"".join(reply.message for reply in replies).decode() == content
    assert "".join(delta.content for reply in replies for delta in reply.chat_deltas) == content
    assert "".join(d.reasoning_content for r in replies for d in r.chat_deltas) == "".join(d.reasoning for d in deltas)
    for reply in replies[:-1]:
        assert len(reply.chat_deltas) == 1
        assert reply.message.decode() == reply.chat_deltas[0].content


DELTAS = st.lists(
    st.one_of(
        st.builds(Delta, content=st.text(min_size=1)),
        st.builds(Delta, reasoning=st.text(min_size=1)),
        st.builds(lambda text: Delta(tool_calls=[ToolCall(0, arguments=text)]), st.text(min_size=1)),
    )
)


def kind(delta: Delta) -> str:
    return "content" if delta.content else "reasoning" if delta.reasoning else "call"


def text_of(delta: Delta) -> str:
    return delta.content or delta.reasoning or "".join(call.arguments for call in delta.tool_calls)


@given(DELTAS)
def test_joined_deltas_say_the_same_in_the_same_order(deltas: list[Delta]) -> None:
    said = [(kind(delta), character) for delta in deltas for character in text_of(delta)]
    fewer = list(joined(deltas))
    assert [(kind(delta), character) for delta in fewer for character in text_of(delta)] == said
    assert all(kind(one) != kind(next_one) for one, next_one in itertools.pairwise(fewer))
