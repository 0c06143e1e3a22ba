"""Lines of the script as the orchestrator would send them, and what must come back."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.pb import backend_pb2 as pb
from tests.models.dialogue import Line, Message

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Thoughts are text where no parser takes them out, so that every line has its answer to the letter.
PARSERS = ("tool_parser:hermes", "reasoning_parser:none")
# Makes an answer so long that the engine is busy with it until somebody stops it.
ENDLESS: dict[str, Any] = {"IgnoreEOS": True, "Tokens": 3500}


def model_options(folder: Path, *options: str, **fields: Any) -> pb.ModelOptions:
    """LoadModel's request for a folder, with some of what the orchestrator always adds."""
    return pb.ModelOptions(
        Model=str(folder),
        ModelFile=str(folder),
        ContextSize=4096,
        Threads=4,
        NBatch=512,
        Seed=1869,
        Options=options,
        **fields,
    )


def predict_options(line: Line, **fields: Any) -> pb.PredictOptions:
    """A request for the answer of `line`, greedy, and otherwise with the orchestrator's defaults."""
    defaults: dict[str, Any] = {"Temperature": 0.0, "TopP": 0.95, "TopK": 40, "Seed": 1869, "NKeep": 1, "Threads": 4}
    if line.prompt:
        return pb.PredictOptions(Prompt=line.prompt, **(defaults | fields))
    if line.tools:
        defaults["Tools"] = json.dumps(line.tools)
    if line.enable_thinking is not None:
        defaults["Metadata"] = {"enable_thinking": "true" if line.enable_thinking else "false"}
    return pb.PredictOptions(
        UseTokenizerTemplate=True, Messages=[_message(message) for message in line.messages], **(defaults | fields)
    )


def chat(text: str, **fields: Any) -> pb.PredictOptions:
    """A request with one message of the user."""
    defaults: dict[str, Any] = {"UseTokenizerTemplate": True, "Messages": [pb.Message(role="user", content=text)]}
    return pb.PredictOptions(**(defaults | fields))


def raw(prompt: str, **fields: Any) -> pb.PredictOptions:
    """A request with a raw prompt."""
    return pb.PredictOptions(Prompt=prompt, **fields)


def calls(deltas: Iterable[pb.ToolCallDelta]) -> list[tuple[str, Any]]:
    """(name, arguments) of the tool calls, put together as the orchestrator does: by index."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in deltas:
        names[delta.index] = delta.name or names.get(delta.index, "")
        arguments[delta.index] = arguments.get(delta.index, "") + delta.arguments
    assert sorted(names) == list(range(len(names)))
    return [(names[index], json.loads(arguments[index])) for index in sorted(names)]


def content(replies: Sequence[pb.Reply]) -> str:
    """The text of a stream, as the endpoints that read `message` see it."""
    return b"".join(reply.message for reply in replies).decode()


def stream_calls(replies: Sequence[pb.Reply]) -> list[tuple[str, Any]]:
    """The tool calls of a stream."""
    return calls(call for reply in replies for delta in reply.chat_deltas for call in delta.tool_calls)


def check_shape(replies: Sequence[pb.Reply]) -> None:
    """Each chunk is text, reasoning, tool calls, or the end with the totals: the one shape right everywhere."""
    *chunks, last = replies
    started: set[int] = set()
    tokens = 0
    for chunk in chunks:
        text = chunk.message.decode()  # whole characters, or this raises
        assert REPLACEMENT not in text
        (delta,) = chunk.chat_deltas
        assert delta.content == text
        # Exactly one of the three.
        assert [bool(text), bool(delta.reasoning_content), bool(delta.tool_calls)].count(True) == 1
        for call in delta.tool_calls:
            first = call.index not in started
            started.add(call.index)
            assert bool(call.id) is first
            assert bool(call.name) is first
        assert not chunk.logprobs
        assert chunk.timing_prompt_processing == chunk.timing_token_generation == 0
        assert chunk.tokens >= tokens
        tokens = chunk.tokens
    assert last.message == b""
    assert not last.chat_deltas
    assert last.tokens >= max(tokens, 1)
    assert last.prompt_tokens > 0
    assert last.timing_prompt_processing > 0
    assert last.timing_token_generation >= 0


def _message(message: Message) -> pb.Message:
    return pb.Message(
        role=message["role"],
        content=message["content"],
        tool_call_id=message.get("tool_call_id", ""),
        tool_calls=json.dumps(message["tool_calls"]) if "tool_calls" in message else "",
    )
