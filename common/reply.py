"""Deltas -> `Reply` messages, in the one shape that every endpoint of the orchestrator reads right.

`message` equals the content of the chunk's delta: clean text, no reasoning, no markup. Reasoning and tool calls have
chunks of their own with an empty `message`. Token counts are cumulative on every chunk, since the orchestrator keeps
the last; times and log-probabilities come in the last chunk alone, which carries nothing else.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from common.pb import backend_pb2 as pb


@dataclasses.dataclass(slots=True)
class ToolCall:
    """A fragment of a tool call: the first of an index has id and name, later ones only arguments."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclasses.dataclass(slots=True)
class Delta:
    """What one step added: exactly one of the three is set."""

    content: str = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()


@dataclasses.dataclass(slots=True)
class Usage:
    """Totals of one request; times in milliseconds, from the engine's own clock."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_ms: float = 0.0
    """From scheduling to the first token: the prefill."""
    generation_ms: float = 0.0
    """From the first token to the last."""


@dataclasses.dataclass(slots=True)
class Completion:
    """A whole answer."""

    content: str
    reasoning: str
    tool_calls: Sequence[ToolCall]
    usage: Usage
    logprobs: Sequence[str]


def joined(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """The same in fewer: neighbours of one kind become one."""
    last: Delta | None = None
    for delta in deltas:
        if last is None:
            last = delta
        elif last.content and delta.content:
            last.content += delta.content
        elif last.reasoning and delta.reasoning:
            last.reasoning += delta.reasoning
        elif last.tool_calls and delta.tool_calls:
            last.tool_calls = [*last.tool_calls, *delta.tool_calls]
        else:
            yield last
            last = delta
    if last is not None:
        yield last


def chunk(delta: Delta, usage: Usage) -> pb.Reply:
    """One message of a stream."""
    # Field by field, which is half the work of constructors that are handed parts.
    reply = pb.Reply()
    part = reply.chat_deltas.add()
    if content := delta.content:
        reply.message = content.encode()
        part.content = content
    elif reasoning := delta.reasoning:
        part.reasoning_content = reasoning
    else:
        _add(part, delta.tool_calls)
    reply.tokens = usage.completion_tokens
    reply.prompt_tokens = usage.prompt_tokens
    return reply


def last_chunk(usage: Usage, logprobs: Sequence[str]) -> pb.Reply:
    """The end of a stream: totals, times and log-probabilities (see `logprob_texts`), nothing else."""
    return pb.Reply(
        tokens=usage.completion_tokens,
        prompt_tokens=usage.prompt_tokens,
        timing_prompt_processing=usage.prompt_ms,
        timing_token_generation=usage.generation_ms,
        logprobs=f'{{"content":[{",".join(logprobs)}]}}'.encode() if logprobs else b"",
    )


def whole(completion: Completion) -> pb.Reply:
    """The reply to a unary Predict."""
    reply = last_chunk(completion.usage, completion.logprobs)
    reply.message = completion.content.encode()
    part = reply.chat_deltas.add(content=completion.content, reasoning_content=completion.reasoning)
    _add(part, completion.tool_calls)
    return reply


def _add(part: pb.ChatDelta, calls: Iterable[ToolCall]) -> None:
    for call in calls:
        added = part.tool_calls.add()
        added.index = call.index
        if call.id:
            added.id = call.id
        if call.name:
            added.name = _text(call.name)
        if call.arguments:
            added.arguments = _text(call.arguments)


def _text(text: str) -> str:
    """`text` as the wire can carry it: a model that writes half a surrogate pair into JSON gets U+FFFD for it."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
