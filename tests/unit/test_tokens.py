"""What TokenizeString and Detokenize refuse before the tokenizer is busy with it."""

import json
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import InvalidRequest
from common.messages import MOST_MESSAGES
from common.pb import backend_pb2 as pb
from common.request import generation_request
from common.tokens import MANY_IDS, MOST_CHARACTERS, MOST_IDS, MOST_TEXT, _check_chat, detokenize, prompt_of, tokenize

VOCABULARY = 10


class Ids(list[int]):
    """Knows the thread that has read it."""

    read_in: threading.Thread | None = None

    def __iter__(self) -> Any:
        self.read_in = threading.current_thread()
        return super().__iter__()


class Renderer:
    """Knows how many ids it was to decode."""

    decoded = 0

    async def _async_tokenizer_decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        if ids == [3]:
            msg = "the tokenizer refuses it"
            raise ValueError(msg)
        return "a" * (9 if ids[:1] == [9] else 1) * len(ids)


@pytest.fixture
def llm() -> Any:
    config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
    return SimpleNamespace(model_config=config, renderer=Renderer())


async def test_many_ids_are_looked_through_outside_of_the_event_loop(llm: Any) -> None:
    few, many = Ids([1] * MANY_IDS), Ids([1] * (MANY_IDS + 1))
    assert len(await detokenize(llm, few)) == MANY_IDS
    assert len(await detokenize(llm, many)) == MANY_IDS + 1
    assert few.read_in is threading.current_thread()
    assert many.read_in not in (None, threading.current_thread())


async def test_more_ids_than_are_decoded(llm: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^tokens: has {MOST_IDS + 1} ids; use at most {MOST_IDS}$"):
        await detokenize(llm, [1] * (MOST_IDS + 1))
    assert llm.renderer.decoded == 0


async def test_more_text_than_a_message_holds(llm: Any) -> None:
    count = MOST_TEXT // 9
    assert len(await detokenize(llm, [9] * count)) == 9 * count
    with pytest.raises(InvalidRequest, match=rf"^tokens: have a text of {9 * count + 9} characters; .* {MOST_TEXT}$"):
        await detokenize(llm, [9] * (count + 1))


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
@pytest.mark.parametrize("before", [1, MANY_IDS])
async def test_an_id_outside_the_vocabulary(llm: Any, wrong: int, before: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"^tokens\[{before}\]: {wrong} is not a token id; use 0 to 9$"):
        await detokenize(llm, [5] * before + [wrong, 99])


async def test_what_the_tokenizer_refuses_is_the_caller_s(llm: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^tokens: the tokenizer refuses it$"):
        await detokenize(llm, [3])


async def test_nothing_to_decode(llm: Any) -> None:
    assert await detokenize(llm, []) == ""


LONG = "a" * (MOST_CHARACTERS + 1)
USER = pb.Message(role="user", content="Hi")
USER_OF_100 = pb.Message(role="user", content="a" * 100)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"text": LONG[:-100]})}}
TOOL = json.dumps([{"type": "function", "function": {"name": "f", "description": LONG[: MOST_CHARACTERS // 10]}}])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Prompt": LONG}, "Prompt: has 2000001 characters; use at most 2000000"),
        ({"Messages": [pb.Message(role="user", content=LONG)]}, "Messages: more characters than 2000000"),
        (
            {"Messages": [pb.Message(role="user", content=LONG)], "Images": ["http://localhost/a.png"]},
            "Messages: more characters than 2000000",
        ),
        (
            {"Messages": [USER_OF_100, pb.Message(role="assistant", tool_calls=json.dumps([CALL]))]},
            "Messages: more characters than 2000000",
        ),
        (
            {"Messages": [USER, pb.Message(role="assistant", content="Hi", reasoning_content=LONG)]},
            "Messages: more characters than 2000000",
        ),
        ({"Messages": [USER_OF_100] * MOST_MESSAGES}, "Messages: more characters than 2000000"),
        (
            {"Messages": [pb.Message(role="user", content=LONG[: -MOST_CHARACTERS // 10])], "Tools": TOOL},
            "Messages, Tools: more characters than 2000000",
        ),
        (
            {"Messages": [USER], "Metadata": {"chat_template_kwargs": json.dumps({"text": [{"more": LONG}]})}},
            r'Metadata\["chat_template_kwargs"\]: has \d+ characters; use at most 2000000',
        ),
    ],
    ids=["prompt", "content", "parts", "call", "thought", "messages", "tools", "variable"],
)
async def test_a_text_that_is_not_rendered(llm: Any, fields: dict[str, Any], reason: str) -> None:
    """Whose renderer would say that it can't."""
    options = pb.PredictOptions(UseTokenizerTemplate="Messages" in fields, **fields)
    with pytest.raises(InvalidRequest, match=f"^{reason}"):
        await tokenize(llm, prompt_of(options, has_tool_parser=True), None)


def test_media_are_no_text() -> None:
    image = "data:image/png;base64," + "iVBORw0KGgo" + "A" * (MOST_CHARACTERS + 1)
    options = pb.PredictOptions(UseTokenizerTemplate=True, Messages=[USER], Images=[image])
    _check_chat(prompt_of(options, has_tool_parser=True).content)


@pytest.mark.parametrize(
    "fields",
    [
        {"Temperature": float("nan")},
        {"TopK": -2},
        {"Grammar": "root ::= ("},
        {"Grammar": LONG},
        {"Metadata": {"json_schema": "{"}},
        {"Metadata": {"data_parallel_rank": "7"}},
        {"Metadata": {"cache_salt": "@"}},
        {"StopPrompts": [""]},
        {"LogitBias": "{"},
        {"CorrelationId": "\n"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_shapes_the_answer_is_not_read(fields: dict[str, Any]) -> None:
    text = pb.PredictOptions(Prompt="Hi", **fields)
    chat = pb.PredictOptions(UseTokenizerTemplate=True, Messages=[USER], **fields)
    assert prompt_of(text, has_tool_parser=True).content == "Hi"
    rendered = prompt_of(chat, has_tool_parser=True).content
    assert not isinstance(rendered, str)
    assert rendered.messages == [{"role": "user", "content": "Hi"}]
    for options in (text, chat):
        with pytest.raises(InvalidRequest):
            generation_request(options, stream=False, has_tool_parser=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Messages": [pb.Message(role="nobody")]}, r"Messages\[0\].role: 'nobody' is unknown"),
        ({"Messages": [USER], "Tools": "{"}, "Tools: not valid JSON"),
        ({"Messages": [USER], "Tools": LONG}, "Tools: has 2000001 characters"),
        ({"Messages": [USER], "Metadata": {"enable_thinking": "yes"}}, r'Metadata\["enable_thinking"\]: \'yes\' is'),
        ({"Prompt": "Hi", "Images": [""]}, r"Images\[0\]: is empty"),
    ],
)
def test_what_shapes_the_prompt_is(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{reason}"):
        prompt_of(pb.PredictOptions(UseTokenizerTemplate=True, **fields), has_tool_parser=True)
