"""A GGUF file given as the model, as an orchestrator whose models are files has it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.pb import backend_pb2 as pb
from tests.models import gguf_files
from tests.models.script import line
from tests.process.orchestrator import FREE_SECONDS, Backend, Watch, eventually
from tests.process.wire import PARSERS, check_shape, content, predict_options, stream_calls

NAME = "scripted.Q8_0.gguf"


@pytest.fixture(scope="module")
def models(scripted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, with a GGUF file in it and one that is cut short."""
    folder = tmp_path_factory.mktemp("models")
    gguf_files.write(scripted, folder / NAME, "Q8_0")
    (folder / "cut.gguf").write_bytes((folder / NAME).read_bytes()[:-100_000])
    return folder


@pytest.fixture(scope="module")
def serving(models: Path) -> Iterator[Backend]:
    with Backend(env={"VLLM_CACHE_ROOT": str(models / "cache")}) as backend:
        backend.wait_for_health()
        yield backend


def options(models: Path, name: str = NAME) -> pb.ModelOptions:
    """As LocalAI sends it; the file is below ModelPath, and ModelFile may name nothing."""
    return pb.ModelOptions(Model=name, ModelFile="/nowhere/at/all", ModelPath=str(models), Options=PARSERS)


def test_free_during_a_conversion_ends_it(serving: Backend, models: Path) -> None:
    with ThreadPoolExecutor() as pool, Watch(serving) as watch:
        loading = pool.submit(serving.load, options(models))
        eventually(lambda: "converting GGUF: importing" in str(watch.seen[-1:]), 120, "the conversion has begun")
        started = time.monotonic()
        assert serving.call("Free", pb.HealthMessage(), timeout=FREE_SECONDS).success
        result = loading.result()
    print(f"Free took {time.monotonic() - started:.1f} s")
    assert not result.success
    assert "cancelled" in result.message
    assert serving.engine_processes() == []
    assert {path.suffix for path in (models / "cache/gguf").glob("*")} <= {".lock"}


def test_a_broken_file_is_refused_at_once(serving: Backend, models: Path) -> None:
    result = serving.load(options(models, "cut.gguf"))
    assert not result.success
    assert "cut.gguf is cut short: the last " in result.message
    assert "\n" not in result.message


def test_it_is_converted_and_answers_to_the_letter(serving: Backend, models: Path) -> None:
    with Watch(serving) as watch:
        result = serving.load(options(models))
    assert result.success, result.message
    assert f"load: {models / NAME} is converted, once, into {models / 'cache/gguf'}" in serving.stderr
    assert "converting GGUF: " in str(watch.seen)
    for name in ("plain", "reasoning", "tool", "unicode"):
        asked = line(name)
        replies = serving.stream(predict_options(asked))
        check_shape(replies)
        assert content(replies).strip() == asked.answer.partition("<tool_call>")[0].strip()
    ((called, arguments),) = stream_calls(serving.stream(predict_options(line("tool"))))
    assert called
    assert arguments
    # The identity is what the orchestrator called it.
    assert serving.call("Predict", predict_options(line("plain"), ModelIdentity=NAME)).message


def test_it_is_converted_once(serving: Backend, models: Path) -> None:
    assert serving.call("Free", pb.HealthMessage(), timeout=FREE_SECONDS).success
    assert serving.load(options(models)).success
    assert f"load: {models / NAME} was converted before: {models / 'cache/gguf'}" in serving.stderr
    assert serving.stderr.count("is converted, once, into") == 2  # once to be cancelled
    assert len([path for path in (models / "cache/gguf").iterdir() if path.is_dir()]) == 1
