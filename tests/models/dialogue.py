"""The form in which the script is written: lines, with messages, tools and tool calls as in OpenAI's API."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

Message = dict[str, Any]
Tool = dict[str, Any]


class Call(NamedTuple):
    """A tool call that the model makes."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What is asked: `messages` (or the raw `prompt`) and `tools`, as in OpenAI's API; and the parsed answer.

    `messages` and `tools` are new copies at each access, because vLLM edits the messages that it is given in
    place. `content` and `reasoning` are without the line breaks that separate them from markers in the raw
    `answer`; parsers differ in which of these they keep, streaming or not.
    """

    name: str
    chat: Sequence[Message] = ()
    prompt: str = ""
    toolbox: Sequence[Tool] = ()
    enable_thinking: bool | None = None
    content: str = ""
    reasoning: str = ""
    tool_calls: Sequence[Call] = ()

    @property
    def messages(self) -> list[Message]:
        return deepcopy(list(self.chat))

    @property
    def tools(self) -> list[Tool]:
        return deepcopy(list(self.toolbox))

    @property
    def answer(self) -> str:
        """The raw text that the model writes, markers included, EOS left out."""
        parts = [self.content] if self.content else []
        for name, arguments in self.tool_calls:
            call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
            parts.append(f"<tool_call>\n{call}\n</tool_call>")
        thought = f"<think>\n{self.reasoning}\n</think>\n\n" if self.reasoning else ""
        return thought + "\n".join(parts)


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, *calls: Call) -> Message:
    """A past answer; the ids of its calls are `call_0`, `call_1`, …"""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for index, (name, arguments) in enumerate(calls)
        ]
    return message


def result(index: int, content: str) -> Message:
    """What the tool call `call_{index}` gave."""
    return {"role": "tool", "tool_call_id": f"call_{index}", "content": content}


def tool(name: str, description: str, required: Sequence[str], **properties: Mapping[str, Any]) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
