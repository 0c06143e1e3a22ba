"""gpt-oss' chats, by its own vocabulary: vLLM's renderer, detokenizer and parser are real, the engine recites.

Its tokenizer holds Python's lock for as long as it takes, so what would take long is refused before.
"""

import base64
import json
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from common.errors import InvalidRequest
from common.harmony import MOST_RUN_BYTES
from common.model import Model
from common.pb import backend_pb2 as pb
from common.request import GenerationRequest, generation_request
from common.tokens import MOST_CHARACTERS, prompt_of, tokenize
from common.vllm_errors import translated
from tests.parsers.cases import TOOLS, Case
from tests.parsers.feed import Bench, Outcome
from tests.parsers.formats import FORMATS

(FORM,) = (form for form in FORMATS if form.model_type == "gpt_oss")
THOUGHT = "<|channel|>analysis<|message|>It waits. So?\n\nI greet.<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>Hello there.\n\nBye"


@pytest.fixture
def bench() -> Bench:
    """With tools and thoughts."""
    return Bench(FORM, "openai", "openai_gptoss")


def chat(content: str = "Hi", **fields: Any) -> pb.PredictOptions:
    return pb.PredictOptions(UseTokenizerTemplate=True, Messages=[pb.Message(role="user", content=content)], **fields)


def understood(options: pb.PredictOptions) -> GenerationRequest:
    return generation_request(options, stream=False, has_tool_parser=True)


@pytest.mark.parametrize("splits", [(), (1,) * 100, (3, 5, 2, 9)])
@pytest.mark.parametrize(
    ("raw", "stop", "expected"),
    [
        (ANSWER, "\n\n", Outcome("Hello there.")),
        (ANSWER, "ere", Outcome("Hello th")),
        (ANSWER, "Hello", Outcome("")),
        (ANSWER, "Bye", Outcome("Hello there.\n\n")),
        (ANSWER, "never said", Outcome("Hello there.\n\nBye")),
        (THOUGHT + ANSWER, "ts. S", Outcome("", "It wai")),
        (THOUGHT + ANSWER, "there", Outcome("Hello ", "It waits. So?\n\nI greet.")),
    ],
)
async def test_an_answer_ends_before_its_stop_string(
    bench: Bench, raw: str, stop: str, expected: Outcome, splits: tuple[int, ...]
) -> None:
    bench.take_up(Case(raw=raw))
    assert await bench.ours_whole([stop]) == expected
    assert await bench.ours_streamed(splits, [stop]) == expected


async def test_a_chat_is_rendered_in_a_thread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    render, threads = bench.generator.renderer.render_chat, set()

    async def rendered(*args: Any) -> Any:
        threads.add(threading.current_thread())
        return await render(*args)

    monkeypatch.setattr(bench.generator.renderer, "render_chat", rendered)
    engine_input = await bench.generator.render(understood(chat("Hi")))
    text = bench.reciter.tokenizer.decode(engine_input["prompt_token_ids"])
    assert text.endswith("<|start|>user<|message|>Hi<|end|><|start|>assistant")
    assert threads
    assert threading.main_thread() not in threads


@pytest.mark.parametrize(
    "fields",
    [{}, {"Metadata": {"reasoning_effort": "high"}}, {"Tools": json.dumps(TOOLS)}],
    ids=["plain", "effort", "tools"],
)
async def test_what_is_counted_is_what_is_generated_from(bench: Bench, fields: dict[str, Any]) -> None:
    options = chat("Hi", **fields)
    engine_input = await bench.generator.render(understood(options))
    model = Model.__new__(Model)
    model._generator, model._engine = bench.generator, cast("Any", SimpleNamespace(llm=bench.reciter))
    counted = (await model.tokenize(options)).tokens
    assert list(counted) == engine_input["prompt_token_ids"]


async def test_an_effort_that_it_lacks(bench: Bench) -> None:
    options = chat("Hi", Metadata={"reasoning_effort": "none"})
    with pytest.raises(InvalidRequest, match="reasoning_effort"):
        await tokenize(cast("Any", bench.reciter), prompt_of(options, has_tool_parser=True), bench.generator)
    with pytest.raises(InvalidRequest, match="reasoning_effort"), translated("Messages"):
        await bench.generator.render(understood(options))


@pytest.mark.parametrize(
    "text",
    [
        "word " * (MOST_CHARACTERS // 5 + 1),
        "a" * (MOST_RUN_BYTES + 1),
        "中" * (MOST_RUN_BYTES // 3 + 1),
        "a\u0301" * (MOST_RUN_BYTES // 3 + 1),
        "=" * (MOST_RUN_BYTES + 1),
        " \n\t" * (MOST_RUN_BYTES // 3 + 1),
        "/\n" * (MOST_RUN_BYTES // 2 + 1),
        ("a" * (MOST_RUN_BYTES // 3) + " ") * 10,
        ("🎉" * 999 + " ") * 500,
    ],
    ids=["long", "letters", "Chinese", "marks", "signs", "blanks", "signs and breaks", "several", "many"],
)
async def test_what_would_take_long_is_refused(bench: Bench, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"Messages: .*; use at most"):
        await bench.generator.render(understood(chat(text)))
    tools = [{"type": "function", "function": {"name": "f", "description": text[:500_000]}}]
    options = chat(text[500_000:] if len(text) > 500_000 else "Hi", Tools=json.dumps(tools, ensure_ascii=False))
    with pytest.raises(InvalidRequest, match=r"Messages, Tools: .*; use at most"):
        await tokenize(cast("Any", bench.reciter), prompt_of(options, has_tool_parser=True), bench.generator)


async def test_a_schema_that_would_take_long_is_refused(bench: Bench) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "default": [[]] * MOST_RUN_BYTES}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(InvalidRequest, match=r"Messages, Tools: .*; use at most"):
        await bench.generator.render(understood(chat("Hi", Tools=json.dumps(tools))))


async def test_it_is_refused_before_it_is_rendered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.generator.renderer, "render_chat", None)
    with pytest.raises(InvalidRequest, match=r"Messages: .*; use at most"):
        await bench.generator.render(understood(chat("a" * (MOST_RUN_BYTES + 1))))


async def test_media_are_refused(bench: Bench) -> None:
    options = chat("Hi", Images=["iVBORw0KGgo" + "A" * 3_000_000])
    with pytest.raises(InvalidRequest, match=r"^Images: this model takes text only$"):
        await bench.generator.render(understood(options))
    with pytest.raises(InvalidRequest, match=r"^Images: this model takes text only$"):
        await tokenize(cast("Any", bench.reciter), prompt_of(options, has_tool_parser=True), bench.generator)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 20_000,
        "a" * (MOST_RUN_BYTES // 4),
        base64.b64encode(bytes(range(256)) * 1000).decode(),
        "好的、我明白了。" * 20_000,
        "a b=c\n" * 20_000,
    ],
    ids=["text", "letters", "base64", "Chinese", "code"],
)
async def test_what_is_long_and_does_not_take_long(bench: Bench, text: str) -> None:
    counted = await tokenize(cast("Any", bench.reciter), prompt_of(chat(text), has_tool_parser=True), bench.generator)
    assert len(counted) > 1000
