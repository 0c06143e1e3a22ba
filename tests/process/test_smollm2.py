"""A real model: small, but with weights, a tokenizer and a template that nobody made for these tests."""

import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.process.orchestrator import ENGINE_ENVIRONMENT, REPOSITORY, RUN_SH, Backend, eventually
from tests.process.wire import chat, check_shape, content, model_options

# In float32: with fewer bits the first token of the answer is a near tie.
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def served(backend: Backend, smollm2: Path) -> Iterator[Backend]:
    """A server with SmolLM2 in it."""
    started = time.monotonic()
    result = backend.load(model_options(smollm2, DType="float32", EngineArgs='{"max_model_len": 1024}'))
    assert result.success, result.message
    print(f"loaded in {time.monotonic() - started:.1f} s")
    yield backend
    backend.stop()


def test_answer(served: Backend) -> None:
    request = chat(QUESTION, Tokens=64, TopK=40, TopP=0.95)
    replies = served.stream(request)
    check_shape(replies)
    print(f"{content(replies)!r}: {replies[-1].tokens} tokens in {replies[-1].timing_token_generation:.0f} ms")
    assert "Paris" in content(replies)
    unary: pb.Reply = served.call("Predict", request)
    assert unary.message.decode() == content(replies)
    assert unary.tokens == replies[-1].tokens


def test_stop_string(served: Backend) -> None:
    whole = content(served.stream(chat(QUESTION, Tokens=64)))
    stopped = served.stream(chat(QUESTION, Tokens=64, StopPrompts=["Paris"]))
    check_shape(stopped)
    assert content(stopped) == whole.partition("Paris")[0]


def test_limit_of_tokens(served: Backend) -> None:
    replies = served.stream(chat("Tell me a long story.", Tokens=7))
    assert replies[-1].tokens == 7


def test_context_is_filled_where_no_limit_is_given(served: Backend) -> None:
    prompt = " word" * 1000
    replies = served.stream(pb.PredictOptions(Prompt=prompt, IgnoreEOS=True))
    assert replies[-1].prompt_tokens + replies[-1].tokens == 1024


def test_chat_with_a_server_that_runs(served: Backend, smollm2: Path) -> None:
    (engine,) = served.engine_cores()
    # The same model with the same options in other words: it is there already.
    options = ("--option=--dtype:float32", "--option=--max-model-len:1024")
    result = subprocess.run(
        [RUN_SH, "chat", "--addr", served.addr, "--model", smollm2, *options, QUESTION],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert served.stderr.count("Initializing a V1 LLM engine") == 1
    # It has freed the model, and the server is somebody else's.
    assert not engine.is_running()
    assert served.status().state == pb.StatusResponse.UNINITIALIZED


def test_chat_in_a_terminal(served: Backend, smollm2: Path) -> None:
    # One engine at a time.
    assert served.status().state == pb.StatusResponse.UNINITIALIZED
    mark = {"TERMINAL_TEST_MARK": uuid.uuid4().hex}
    result = subprocess.run(
        [RUN_SH, "chat", "--model", smollm2, "--option=--dtype:float32", "--tokens", "64", QUESTION],
        cwd=REPOSITORY.parent,
        env=os.environ | ENGINE_ENVIRONMENT | mark,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    print(result.stderr)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert re.search(r"\d+\.\d tokens/s", result.stderr)
    eventually(lambda: not _marked(mark), 2, "no process of the server is left")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "/no/such/folder", "hello"), "/no/such/folder"),
        (("--model", ".", "--addr", "127.0.0.1:1", "hello"), "UNAVAILABLE"),
        (("hello",), "--model"),
    ],
)
def test_chat_that_cannot_be(arguments: tuple[str, ...], words: str) -> None:
    result = subprocess.run(
        [RUN_SH, "chat", *arguments], capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode > 0
    assert result.stdout == ""
    assert words in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr


def _marked(mark: dict[str, str]) -> list[int]:
    ((name, value),) = mark.items()
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
