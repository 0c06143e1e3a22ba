"""vLLM's exceptions -> ours, by what vLLM's own server would answer."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import (
    GenerationError,
    MaxQueuedTokensError,
    QueueOverflowError,
    RetryableRequestError,
    VLLMClientError,
    VLLMNotFoundError,
    VLLMServerError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from common.errors import EngineGone, InvalidRequest, Overloaded, Unsupported
from common.vllm_errors import ENGINE_DIED, admit_together, translated

RENDERER_BUSY = (
    "Messages: the chat template had not been rendered after 30 s (VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT); try again later"
)


def caused(error: Exception, cause: BaseException | None) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (EngineDeadError(), EngineGone, ENGINE_DIED),
        (VLLMValidationError("bad", parameter="seed", value=1), InvalidRequest, "Seed: bad"),
        (VLLMValidationError("bad"), InvalidRequest, "Messages: bad"),
        (VLLMValidationError("long", parameter="input_tokens", value=9), InvalidRequest, "Messages: long"),
        (VLLMUnprocessableEntityError("bad"), InvalidRequest, "Messages: bad"),
        (VLLMNotFoundError("bad"), InvalidRequest, "Messages: bad"),
        (VLLMClientError("bad"), InvalidRequest, "Messages: bad"),
        (ValueError("bad"), InvalidRequest, "Messages: bad"),
        (TypeError("bad"), InvalidRequest, "Messages: bad"),
        (RecursionError("depth"), InvalidRequest, "Messages: has something that is nested too deep"),
        (TimeoutError("vLLM's"), Overloaded, RENDERER_BUSY),
        (OverflowError("bad"), InvalidRequest, "Messages: bad"),
        (NotImplementedError("not yet"), Unsupported, "not yet"),
        (RetryableRequestError("busy"), Overloaded, "busy"),
        (QueueOverflowError(), Overloaded, str(QueueOverflowError())),
        (MaxQueuedTokensError(), Overloaded, str(MaxQueuedTokensError())),
        (caused(EngineGenerateError(), ValueError("bad")), InvalidRequest, "Messages: bad"),
        (caused(EngineGenerateError(), RetryableRequestError("busy")), Overloaded, "busy"),
        (caused(EngineGenerateError(), RuntimeError("bug")), RuntimeError, "bug"),
        (EngineGenerateError("bug"), EngineGenerateError, "bug"),
        (GenerationError("bug"), GenerationError, "bug"),
        (VLLMServerError("bug"), VLLMServerError, "bug"),
        (RuntimeError("bug"), RuntimeError, "bug"),
        (AssertionError("bug"), AssertionError, "bug"),
        (KeyError("bug"), KeyError, "'bug'"),
        (EngineGone("ours"), EngineGone, "ours"),
        (InvalidRequest("Tools", "ours"), InvalidRequest, "Tools: ours"),
        (asyncio.CancelledError(), asyncio.CancelledError, ""),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exceptions_of_vllm(error: BaseException, kind: type[BaseException], text: str) -> None:
    with pytest.raises(BaseException) as caught, translated("Messages"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value) == text
    assert caught.value is error or caught.value.__cause__ is error or isinstance(error, EngineGenerateError)


def test_nothing_happens_without_an_exception() -> None:
    with translated("Messages"):
        pass


def test_a_template_that_refuses() -> None:
    jinja2 = pytest.importorskip("jinja2")
    with pytest.raises(InvalidRequest, match="Messages: roles must alternate"), translated("Messages"):
        raise jinja2.TemplateError("roles must alternate")


def test_the_prompt_is_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught, translated("Prompt"):
        raise VLLMValidationError("too long", parameter="input_text", value="sec" + "ret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("requests", "tokens", "problem"),
    [
        (4, 99, ""),
        (5, 0, "would be 5 requests at a time; 4 are admitted (--max-waiting-requests)"),
        (1, 100, "would be 101 prompt tokens or more at a time; 100 are admitted (--max-waiting-tokens)"),
    ],
)
def test_more_than_is_ever_admitted(requests: int, tokens: int, problem: str) -> None:
    asked: list[int] = []
    limits = SimpleNamespace(max_num_queued_reqs=4, max_num_queued_tokens=100)
    llm: Any = SimpleNamespace(vllm_config=SimpleNamespace(scheduler_config=limits), check_admission=asked.append)
    if problem:
        with pytest.raises(InvalidRequest) as caught:
            admit_together(llm, "documents", requests, tokens)
        assert str(caught.value) == f"documents: {problem}"
    else:
        admit_together(llm, "documents", requests, tokens)
    assert asked == ([] if problem else [requests])
