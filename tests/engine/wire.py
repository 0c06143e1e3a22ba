"""Script lines as `PredictOptions`, and replies put together as the orchestrator does it."""

import dataclasses
import json
from typing import Any

from common.model import Model
from common.pb import backend_pb2 as pb
from tests.models.dialogue import Line


def options(line: Line, **fields: Any) -> pb.PredictOptions:
    """The request that the orchestrator would send for a line of the script."""
    request = pb.PredictOptions(**fields)
    if line.prompt:
        request.Prompt = line.prompt
        return request
    request.UseTokenizerTemplate = True
    for message in line.messages:
        calls = message.get("tool_calls")
        request.Messages.add(
            role=message["role"],
            content=message.get("content") or "",
            name=message.get("name", ""),
            tool_call_id=message.get("tool_call_id", ""),
            tool_calls=json.dumps(calls) if calls else "",
        )
    if line.tools:
        request.Tools = json.dumps(line.tools)
    if line.enable_thinking is not None:
        request.Metadata["enable_thinking"] = "true" if line.enable_thinking else "false"
    return request


@dataclasses.dataclass
class Answer:
    """A reply, or all chunks of one, put together."""

    message: str = ""
    content: str = ""
    reasoning: str = ""
    tool_calls: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    """index -> [id, name, arguments]"""

    def add(self, reply: pb.Reply) -> None:
        """Merge as the orchestrator does: text concatenates, id and name are set once, arguments concatenate."""
        self.message += reply.message.decode()
        for delta in reply.chat_deltas:
            self.content += delta.content
            self.reasoning += delta.reasoning_content
            for call in delta.tool_calls:
                merged = self.tool_calls.setdefault(call.index, ["", "", ""])
                merged[0] = call.id or merged[0]
                merged[1] = call.name or merged[1]
                merged[2] += call.arguments

    @property
    def calls(self) -> list[tuple[str, Any]]:
        """(name, arguments) in the order of their indices."""
        return [(name, json.loads(arguments)) for _, (_, name, arguments) in sorted(self.tool_calls.items())]


async def predict(model: Model, request: pb.PredictOptions) -> tuple[Answer, pb.Reply]:
    """The whole answer."""
    reply = await model.predict(request)
    answer = Answer()
    answer.add(reply)
    return answer, reply


async def stream(model: Model, request: pb.PredictOptions) -> tuple[Answer, list[pb.Reply]]:
    """The streamed answer and its chunks."""
    chunks = [chunk async for chunk in model.predict_stream(request)]
    answer = Answer()
    for chunk in chunks:
        answer.add(chunk)
    return answer, chunks
