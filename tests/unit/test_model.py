"""The front of the package, as far as it goes without an engine."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.parse import MultiModalDataParser

from common import engine_start, media_prompt
from common import model as room
from common.abilities import Abilities
from common.engine_log import StageClock
from common.errors import InvalidRequest, LoadFailed
from common.frontends import Alone
from common.model import LoadPlan, Model
from common.pb import backend_pb2 as pb


def engine(mm_processor: Any, **abilities: Any) -> Any:
    """What a model asks of an engine that pools while it is made."""
    able = Abilities(frozenset(), **{"pooling": None, "ranks": False} | abilities)
    llm = SimpleNamespace(renderer=SimpleNamespace(mm_processor=mm_processor))
    return SimpleNamespace(llm=llm, abilities=able, statistics=None)


LONG = 100_000


def chat(messages: int, **fields: Any) -> pb.PredictOptions:
    message = pb.Message(role="user", content="x")
    return pb.PredictOptions(UseTokenizerTemplate=True, Messages=[message] * messages, **fields)


@pytest.fixture
def log_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave pytest's own handlers without the filter that a model puts on them."""
    monkeypatch.setattr(room, "leave_texts_out", lambda: None)


@pytest.mark.usefixtures("log_as_it_is")
@pytest.mark.parametrize("pooling", ["embed", "token_embed", "classify", None])
def test_clips_are_resampled_by_what_is_installed_whatever_the_model_does(
    pooling: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_prompt, "_RESAMPLERS", {"pyav": "no_such_module", "soxr": "json"})
    parsers = [MultiModalDataParser(target_sr=16000) for _ in range(2)]
    processor = SimpleNamespace(data_parser=parsers[0], info=SimpleNamespace(data_parser=parsers[1]))
    Model(engine(processor, pooling=pooling), LoadPlan({}))
    assert [parser.audio_resampler.method for parser in parsers] == ["soxr", "soxr"]


@pytest.mark.usefixtures("log_as_it_is")
@pytest.mark.parametrize("resamplers", [{"soxr": "json"}, {"soxr": "no_such_module"}])
def test_models_without_a_processor_for_media(resamplers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_prompt, "_RESAMPLERS", resamplers)
    Model(engine(None, pooling="embed"), LoadPlan({}))


@pytest.mark.parametrize(
    ("options", "in_a_thread"),
    [
        (pb.PredictOptions(Prompt="x"), False),
        (pb.PredictOptions(Prompt="x", Metadata={"enable_thinking": "true"}), False),
        (chat(200), False),
        (chat(1000), True),
        (chat(1, Tools=" " * LONG), True),
        (chat(1, ToolChoice=" " * LONG), True),
        (chat(1, Metadata={"chat_template_kwargs": " " * LONG}), True),
        (pb.PredictOptions(Prompt="x", Grammar='root ::= "a"'), True),
        (pb.PredictOptions(Prompt="x", Metadata={"json_schema": "{}"}), True),
        (pb.PredictOptions(Prompt="x", Metadata={"response_format": '{"type": "text"}'}), True),
    ],
    ids=lambda value: str(value).replace("\n", " ")[:60],
)
async def test_what_takes_long_is_read_outside_the_event_loop(
    options: pb.PredictOptions, in_a_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[str] = []

    def read(*_args: Any, **_kwargs: Any) -> Any:
        readers.append(threading.current_thread().name)
        raise InvalidRequest("Prompt", "enough")

    monkeypatch.setattr(room, "generation_request", read)
    model = Model.__new__(Model)
    model.plan = LoadPlan({})
    model._generator = SimpleNamespace(has_tool_parser=False, max_logprobs=20)  # type: ignore[assignment]
    model._engine = SimpleNamespace(ranks=1)  # type: ignore[assignment]
    with pytest.raises(InvalidRequest):
        await model.predict(options)
    with pytest.raises(InvalidRequest):
        await anext(model.predict_stream(options))
    assert [reader.startswith("request") for reader in readers] == [in_a_thread] * 2


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each engine had to stop that no model could be made of."""
    stopped: list[float] = []

    async def start(*_: Any) -> Any:
        async def stop(timeout: float) -> None:
            stopped.append(timeout)

        return SimpleNamespace(stop=stop)

    def fail(*_: Any) -> None:
        raise LoadFailed("no parser")

    monkeypatch.setattr(engine_start, "start", start)
    monkeypatch.setattr(Model, "__init__", fail)
    return stopped


async def test_a_load_whose_others_cannot_leave_leaves_no_engine(stopped: list[float]) -> None:
    class Others(Alone):
        async def detach(self) -> None:
            raise OSError(24, "Too many open files")

    plan: Any = SimpleNamespace(gguf=None)
    with pytest.raises(OSError, match="Too many"):
        await Model.load(plan, StageClock(lambda *_: None), Others())
    assert stopped == [0]


async def test_a_load_that_is_given_up_twice_leaves_no_engine(stopped: list[float]) -> None:
    detaching, go_on = asyncio.Event(), asyncio.Event()

    class Others(Alone):
        async def detach(self) -> None:
            detaching.set()
            await go_on.wait()

    plan: Any = SimpleNamespace(gguf=None)
    loading = asyncio.create_task(Model.load(plan, StageClock(lambda *_: None), Others()))
    await asyncio.wait_for(detaching.wait(), 5)
    for _ in range(2):
        loading.cancel()
        await asyncio.sleep(0)
    assert not stopped
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(loading, 5)
    assert stopped == [0]
