"""vLLM's own OpenAI server over the engine under test, and the orchestrator's translation of its requests.

`serve` answers an OpenAI request as vLLM's HTTP server would. `to_wire` turns the same request into the
`PredictOptions` that the orchestrator makes of it, so that both ways can be compared.
"""

import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from copy import deepcopy
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.renderers.online_renderer import OnlineRenderer

from common.media import media_items
from common.model import Model
from common.pb import backend_pb2 as pb

NAME = "under-test"


@dataclasses.dataclass
class Outcome:
    """What a client of either server sees."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """(name, arguments as text)"""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class OpenAIServer:
    """vLLM's chat completions over the engine of a loaded model."""

    def __init__(self, model: Model) -> None:
        llm = model._engine.llm
        chosen = model._engine.parsers
        parsers = {
            "enable_auto_tools": chosen.tool_parser is not None,
            "tool_parser": chosen.tool_parser,
            "reasoning_parser": chosen.reasoning_parser or "",
        }
        template = {"request_logger": None, "chat_template": None, "chat_template_content_format": "auto"}
        renderer = OnlineRenderer(llm.model_config, llm.renderer, **parsers, **template)
        models = OpenAIServingModels(llm, [BaseModelPath(name=NAME, model_path=model.plan.model)])
        self._chat = OpenAIServingChat(llm, models, "assistant", online_renderer=renderer, **parsers, **template)

    async def whole(self, request: Mapping[str, Any]) -> Outcome:
        """The answer in one piece."""
        response = await self._chat.create_chat_completion(ChatCompletionRequest(model=NAME, **_with_our_urls(request)))
        body = json.loads(response.model_dump_json())
        assert "choices" in body, body
        (choice,) = body["choices"]
        message = choice["message"]
        return Outcome(
            content=message.get("content") or "",
            reasoning=message.get("reasoning") or "",
            tool_calls=[
                (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()
            ],
            finish=choice["finish_reason"],
            prompt_tokens=body["usage"]["prompt_tokens"],
            completion_tokens=body["usage"]["completion_tokens"],
            logprobs=(choice.get("logprobs") or {}).get("content") or [],
        )

    async def stream(self, request: Mapping[str, Any]) -> Outcome:
        """The streamed answer, put together."""
        asked = ChatCompletionRequest(
            model=NAME, stream=True, stream_options={"include_usage": True}, **_with_our_urls(request)
        )
        outcome = Outcome()
        calls: dict[int, list[str]] = {}
        events: AsyncIterator[str] = await self._chat.create_chat_completion(asked)
        async for event in events:
            data = event.removeprefix("data: ").strip()
            if data == "[DONE]":
                break
            body = json.loads(data)
            assert "error" not in body, body
            if body.get("usage"):
                outcome.prompt_tokens = body["usage"]["prompt_tokens"]
                outcome.completion_tokens = body["usage"]["completion_tokens"]
            for choice in body["choices"]:
                delta = choice["delta"]
                outcome.content += delta.get("content") or ""
                outcome.reasoning += delta.get("reasoning") or ""
                outcome.logprobs += (choice.get("logprobs") or {}).get("content") or []
                outcome.finish = choice.get("finish_reason") or outcome.finish
                for call in delta.get("tool_calls") or ():
                    merged = calls.setdefault(call["index"], ["", ""])
                    merged[0] += call["function"].get("name") or ""
                    merged[1] += call["function"].get("arguments") or ""
        outcome.tool_calls = [(name, arguments) for _, (name, arguments) in sorted(calls.items())]
        return outcome


def _with_our_urls(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request with its pictures as our connector, which has taken the place of vLLM's, is given them."""
    asked = deepcopy(dict(request))
    for message in asked["messages"]:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image_url":
                (item,) = media_items(pb.PredictOptions(Images=[part["image_url"]["url"]]))
                part["image_url"]["url"] = item.url
    return asked


def outcome_of(replies: list[pb.Reply], max_tokens: int) -> Outcome:
    """Replies of ours as the orchestrator puts them together; the finish reason is its guess."""
    outcome = Outcome()
    calls: dict[int, list[str]] = {}
    for reply in replies:
        for delta in reply.chat_deltas:
            outcome.content += delta.content
            outcome.reasoning += delta.reasoning_content
            for call in delta.tool_calls:
                merged = calls.setdefault(call.index, ["", ""])
                merged[0] += call.name
                merged[1] += call.arguments
    last = replies[-1]
    outcome.tool_calls = [(name, arguments) for _, (name, arguments) in sorted(calls.items())]
    outcome.prompt_tokens, outcome.completion_tokens = last.prompt_tokens, last.tokens
    outcome.logprobs = json.loads(last.logprobs)["content"] if last.logprobs else []
    outcome.finish = (
        "tool_calls" if outcome.tool_calls else "length" if 0 < max_tokens <= outcome.completion_tokens else "stop"
    )
    return outcome


# OpenAI's name -> the wire's, where the value goes over as it is.
_SAME = {
    "temperature": "Temperature",
    "top_p": "TopP",
    "top_k": "TopK",
    "min_p": "MinP",
    "repetition_penalty": "Penalty",
    "frequency_penalty": "FrequencyPenalty",
    "presence_penalty": "PresencePenalty",
    "seed": "Seed",
    "max_completion_tokens": "Tokens",
    "ignore_eos": "IgnoreEOS",
    "stop": "StopPrompts",
}
# ... and where it goes over as JSON.
_JSON = {"tools": "Tools", "tool_choice": "ToolChoice", "logit_bias": "LogitBias"}


def to_wire(request: Mapping[str, Any]) -> pb.PredictOptions:
    """The `PredictOptions` that the orchestrator makes of an OpenAI chat request."""
    wire = pb.PredictOptions(UseTokenizerTemplate=True, Seed=-1)
    left = dict(request)
    for message in left.pop("messages"):
        calls = message.get("tool_calls")
        content = message.get("content") or ""
        if isinstance(content, list):
            # The orchestrator flattens the text and lists the media of all messages in their order.
            wire.Images.extend(part["image_url"]["url"] for part in content if part["type"] == "image_url")
            content = "".join(part["text"] for part in content if part["type"] == "text")
        wire.Messages.add(
            role=message["role"],
            content=content,
            name=message.get("name", ""),
            tool_call_id=message.get("tool_call_id", ""),
            reasoning_content=message.get("reasoning", ""),
            tool_calls=json.dumps([{"index": i, **call} for i, call in enumerate(calls)]) if calls else "",
        )
    for name, field in _SAME.items():
        if name in left:
            value = left.pop(name)
            if name == "stop":
                wire.StopPrompts.extend(value)
            else:
                setattr(wire, field, value)
    for name, field in _JSON.items():
        if name in left:
            setattr(wire, field, json.dumps(left.pop(name), sort_keys=True))
    if left.pop("logprobs", False):
        wire.Logprobs = wire.TopLogprobs = left.pop("top_logprobs")
    if constraint := left.pop("structured_outputs", None):
        wire.Grammar = constraint.get("grammar") or json.dumps(constraint["json"])
    _move_metadata(left, wire)
    assert not left, f"no way over the wire for {sorted(left)}"
    return wire


def _move_metadata(left: dict[str, Any], wire: pb.PredictOptions) -> None:
    """What has no field of its own."""
    if response_format := left.pop("response_format", None):
        wire.Metadata["response_format"] = json.dumps(response_format)
    if salt := left.pop("cache_salt", None):
        wire.Metadata["cache_salt"] = salt
    if left.pop("continue_final_message", False):
        assert left.pop("add_generation_prompt") is False
        wire.Metadata["continue_final_message"] = "true"
    kwargs = left.pop("chat_template_kwargs", None)
    if effort := left.pop("reasoning_effort", None):
        wire.Metadata["reasoning_effort"] = effort
    if kwargs:
        wire.Metadata["chat_template_kwargs"] = json.dumps(kwargs)
