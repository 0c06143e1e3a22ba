"""Every line of the script, streamed and whole, through a real engine: what is said, and the shape it is said in."""

import asyncio
import json

import pytest

from common.errors import InvalidRequest
from common.model import Model
from common.pb import backend_pb2 as pb
from tests.engine.wire import Answer, options, predict, stream
from tests.models.dialogue import Line
from tests.models.script import script

# A hermes parser alone leaves thoughts in the text; they have their own engine below.
SPOKEN = [line for line in script() if not line.reasoning]
THOUGHT = [line for line in script() if line.reasoning]


def _check_shape(chunks: list[pb.Reply]) -> None:
    """The chunk shape that every endpoint of the orchestrator reads right."""
    *body, last = chunks
    named: set[int] = set()
    for chunk in body:
        (delta,) = chunk.chat_deltas
        assert chunk.message.decode() == delta.content  # whole characters, clean text
        assert "\ufffd" not in delta.content
        assert sum(map(bool, (delta.content, delta.reasoning_content, delta.tool_calls))) == 1
        assert not chunk.logprobs
        assert chunk.timing_prompt_processing == chunk.timing_token_generation == 0
        for call in delta.tool_calls:
            if call.index in named:
                assert not call.id
                assert not call.name
            else:
                assert call.index == len(named)
                assert call.id
                assert call.name
                named.add(call.index)
    assert not last.message
    assert not last.chat_deltas
    assert last.tokens > 0
    assert last.prompt_tokens > 0
    assert last.timing_prompt_processing > 0
    counts = [chunk.tokens for chunk in chunks]
    assert counts == sorted(counts)


def _check_answer(line: Line, answer: Answer) -> None:
    assert answer.message == answer.content
    # Parsers keep or drop line breaks around markers; the words are theirs alone.
    assert answer.content.strip() == (line.content or "").strip()
    assert answer.reasoning.strip() == (line.reasoning or "").strip()
    assert answer.calls == [(call.name, call.arguments) for call in line.tool_calls]


@pytest.mark.parametrize("line", SPOKEN, ids=lambda line: line.name)
async def test_stream_equals_whole_and_script(model: Model, line: Line) -> None:
    whole, reply = await predict(model, options(line))
    streamed, chunks = await stream(model, options(line))
    _check_shape(chunks)
    _check_answer(line, whole)
    _check_answer(line, streamed)
    assert streamed.message == whole.message
    assert chunks[-1].tokens == reply.tokens
    assert chunks[-1].prompt_tokens == reply.prompt_tokens
    (delta,) = reply.chat_deltas
    assert reply.message.decode() == delta.content


@pytest.mark.parametrize("line", THOUGHT, ids=lambda line: line.name)
async def test_reasoning_apart(thinking_model: Model, line: Line) -> None:
    whole, _ = await predict(thinking_model, options(line))
    streamed, chunks = await stream(thinking_model, options(line))
    _check_shape(chunks)
    _check_answer(line, whole)
    _check_answer(line, streamed)
    assert any(delta.reasoning_content for chunk in chunks for delta in chunk.chat_deltas)
    assert "<think>" not in streamed.message
    assert "<tool_call>" not in streamed.message


async def test_the_markers_of_a_reasoning_parser_are_told(thinking_model: Model) -> None:
    found = await thinking_model.metadata(pb.ModelOptions())
    assert found.supports_thinking
    assert (found.tool_format.reasoning_start, found.tool_format.reasoning_end) == ("<think>", "</think>")
    assert found.tool_format.per_call_start == "<tool_call>\n"


async def test_all_lines_at_once(model: Model) -> None:
    answers = await asyncio.gather(*(stream(model, options(line)) for line in SPOKEN * 3))
    for line, (answer, chunks) in zip(SPOKEN * 3, answers, strict=True):
        _check_shape(chunks)
        _check_answer(line, answer)


@pytest.mark.parametrize("line", [line for line in SPOKEN if line.tool_calls], ids=lambda line: line.name)
async def test_a_slow_reader_gets_the_same_in_fewer_chunks(model: Model, line: Line) -> None:
    _, chunks = await stream(model, options(line))
    slow = Answer()
    read = []
    async for chunk in model.predict_stream(options(line)):
        slow.add(chunk)
        read.append(chunk)
        await asyncio.sleep(0.2)
    _check_shape(read)
    _check_answer(line, slow)
    assert len(read) < len(chunks)


async def test_messages_win_over_prompt(model: Model) -> None:
    line = SPOKEN[0]
    answer, _ = await predict(model, options(line, Prompt="something else altogether"))
    _check_answer(line, answer)


async def test_tool_choice_none_neither_shows_nor_parses_tools(model: Model) -> None:
    with_tools = next(line for line in SPOKEN if line.tools)
    shown = await model.tokenize(options(with_tools))
    hidden = await model.tokenize(options(with_tools, ToolChoice='"none"'))
    assert hidden.length < shown.length
    answer, _ = await predict(model, options(with_tools, ToolChoice='"none"'))
    assert not answer.tool_calls


@pytest.mark.parametrize("choice", ['"required"', '{"type":"function","function":{"name":"f"}}'])
async def test_a_tool_whose_pattern_cannot_be_compiled(model: Model, choice: str) -> None:
    for length in (128, 129):
        parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": f"^[0-9]{{{length}}}$"}}}
        tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}]
        asked = options(SPOKEN[0], Tools=json.dumps(tools), ToolChoice=choice, Tokens=2)
        if length == 128:
            await predict(model, asked)
            continue
        with pytest.raises(InvalidRequest, match=r"^Tools: .*128 times"):
            await predict(model, asked)


@pytest.mark.parametrize("choice", ['"required"', '{"type":"function","function":{"name":"get_weather"}}'])
async def test_forced_tool_choice(model: Model, choice: str) -> None:
    line = next(line for line in SPOKEN if line.name == "tool")
    answer, _ = await predict(model, options(line, ToolChoice=choice))
    streamed, chunks = await stream(model, options(line, ToolChoice=choice))
    _check_shape(chunks)
    assert answer.calls[0][0] == "get_weather"
    assert streamed.calls == answer.calls
    assert not answer.message


async def test_logprobs_are_cumulative_in_the_last_chunk(model: Model) -> None:
    line = SPOKEN[0]
    _, reply = await predict(model, options(line, Logprobs=3, TopLogprobs=3))
    _, chunks = await stream(model, options(line, Logprobs=3, TopLogprobs=3))
    for logprobs in (reply.logprobs, chunks[-1].logprobs):
        content = json.loads(logprobs)["content"]
        assert len(content) == reply.tokens
        assert all(len(entry["top_logprobs"]) == 3 for entry in content)
        assert content[0]["id"] == content[0]["top_logprobs"][0]["id"]
        text = b"".join(bytes(entry["bytes"]) for entry in content)
        assert text.decode().removesuffix("<|im_end|>") == reply.message.decode()


async def test_what_is_no_character_never_reaches_the_message(model: Model) -> None:
    # A lone lead byte of UTF-8: the first token of an emoji, again and again.
    (first, *_rest) = (await model.tokenize(pb.PredictOptions(Prompt="\U0001f600"))).tokens
    assert "\ufffd" in (await model.detokenize(pb.DetokenizeRequest(tokens=[first]))).content
    request = pb.PredictOptions(Prompt="x", Tokens=5, LogitBias=json.dumps({str(first): 100}))
    whole, reply = await predict(model, request)
    streamed, chunks = await stream(model, request)
    assert reply.tokens == chunks[-1].tokens == 5
    assert "\ufffd" not in whole.message
    assert streamed.message == whole.message
