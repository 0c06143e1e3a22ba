"""Chat requests that are not checked anew are the same as those that are."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pydantic
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from common import known_settings
from common.pb import backend_pb2 as pb
from common.request import generation_request

USER = {"role": "user", "content": "Hi"}
SETTINGS = {
    "temperature": 0.7,
    "top_p": None,
    "top_k": 40,
    "seed": 7,
    "ignore_eos": False,
    "logit_bias": None,
    "stream": True,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": True, "style": "dry", "depth": 1},
}


@pytest.fixture(autouse=True)
def checks() -> Iterator[mock.Mock]:
    """How often vLLM's model has checked anything."""
    known_settings._known.cache_clear()
    with mock.patch.object(known_settings, "ChatCompletionRequest", wraps=ChatCompletionRequest) as model:
        yield model


def made(*messages: Any, **fields: Any) -> ChatCompletionRequest:
    return known_settings.chat_request(messages=list(messages or [USER]), request_id="a", **{**SETTINGS, **fields})


def checked(*messages: Any, **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=list(messages or [USER]), request_id="a", **{**SETTINGS, **fields})


def same(one: ChatCompletionRequest, other: ChatCompletionRequest) -> bool:
    return (
        one.model_dump() == other.model_dump()
        and one.model_fields_set == other.model_fields_set
        and one.model_extra == other.model_extra
        and one.__pydantic_private__ == other.__pydantic_private__
        and list(map(type, vars(one).values())) == list(map(type, vars(other).values()))
    )


def test_settings_are_checked_once(checks: mock.Mock) -> None:
    chats = [[USER], [{"role": "system", "content": ""}, USER, {"role": "assistant", "content": "Ö"}, USER], [USER]]
    for chat in chats:
        assert same(made(*chat), checked(*chat))
    assert checks.call_count == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.5},
        {"stream": False},
        {"seed": None},
        {"logprobs": True, "top_logprobs": 2},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"enable_thinking": True, "style": "dry", "depth": True}},
        {"chat_template_kwargs": {"enable_thinking": True, "style": "dry", "depth": 1.0}},
        {"continue_final_message": True, "add_generation_prompt": False},
    ],
)
def test_others_are_others(checks: mock.Mock, fields: dict[str, Any]) -> None:
    made()
    assert same(made(**fields), checked(**fields))
    assert same(made(**fields), checked(**fields))
    assert same(made(), checked())
    assert checks.call_count == 2


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        ([{"role": "tool", "content": "18 C", "tool_call_id": "a"}], {}),
        ([{**USER, "name": "me"}], {}),
        ([{"role": "assistant", "content": "", "reasoning_content": "Hm."}], {}),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}),
        ([], {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "tool_choice": "auto"}),
        ([], {"logit_bias": {"1": 2.0}}),
        ([], {"structured_outputs": {"choice": ["a"]}}),
        ([], {"cache_salt": "s" * 65}),
        ([], {"chat_template_kwargs": {"documents": []}}),
        ([], {"chat_template_kwargs": {"style": "s" * 65}}),
        ([], {"chat_template_kwargs": {"s" * 65: 1}}),
        ([], {"chat_template_kwargs": dict.fromkeys(map(str, range(33)))}),
    ],
)
def test_what_is_not_plain_is_checked_each_time(
    checks: mock.Mock, messages: list[dict[str, Any]], fields: dict[str, Any]
) -> None:
    for count in (1, 2):
        assert same(made(*messages, **fields), checked(*messages, **fields))
        assert checks.call_count == count


def test_requests_share_nothing_that_can_change() -> None:
    one, other = made(), made()
    for name, value in vars(one).items():
        if isinstance(value, list | dict):
            assert value is not getattr(other, name), name
    one.stop_token_ids = [1]
    one._grammar_from_parser = True
    one.chat_template_kwargs["depth"] = 2
    assert same(made(), checked())


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"top_logprobs": 2}, VLLMValidationError), ({"temperature": "hot"}, pydantic.ValidationError)],
)
def test_what_is_refused_is_refused_each_time(fields: dict[str, Any], error: type[Exception]) -> None:
    for _ in range(2):
        with pytest.raises(error) as mine:
            made(**fields)
        with pytest.raises(error) as its:
            checked(**fields)
        assert str(mine.value) == str(its.value)


def test_requests_of_the_wire_are_known(checks: mock.Mock) -> None:
    options = pb.PredictOptions(
        UseTokenizerTemplate=True,
        Messages=[pb.Message(role="user", content="Hi")],
        Temperature=0.5,
        Metadata={"enable_thinking": "true"},
        StopPrompts=["a"],
    )
    first = generation_request(options, stream=True, has_tool_parser=True)
    options.Messages[0].content, options.CorrelationId = "Ho", "b"
    del options.StopPrompts[:]
    second = generation_request(options, stream=True, has_tool_parser=True)
    assert checks.call_count == 1
    assert (first.openai.stop, second.openai.stop) == (["a"], [])
    assert (first.openai.request_id, second.openai.request_id) == (first.request_id, "b")
    assert isinstance(second.openai, ChatCompletionRequest)
    assert second.openai.messages == [{"role": "user", "content": "Ho"}]
