"""What no toy model shows: speakers, and a transcriber that was closed."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import EngineGone, Unsupported
from common.lora import NO_ADAPTERS, Adapters
from common.pb import backend_pb2 as pb
from common.speech import Transcriber, _Run
from common.speech_prompt import Task
from common.transcript import Segment

SAID = "[0.5][S01]Hello there.[1.25][1.30][S02]Hi![2.0]"


@pytest.fixture
def transcriber(monkeypatch: pytest.MonkeyPatch) -> Transcriber:
    """Of MOSS-Transcribe-Diarize, without an engine."""
    moss = importlib.import_module("vllm.model_executor.models.moss_transcribe_diarize")
    monkeypatch.setattr(
        "common.speech_prompt.get_model_cls", lambda _config: moss.MossTranscribeDiarizeForConditionalGeneration
    )
    engine: Any = SimpleNamespace(llm=SimpleNamespace(model_config=SimpleNamespace(get_diff_sampling_param=dict)))
    return Transcriber(engine, Adapters(NO_ADAPTERS))


def test_speakers(transcriber: Transcriber) -> None:
    run = _Run(transcriber, pb.TranscriptRequest(), stream=False)
    assert run._without_speakers(SAID, Task(diarize=True)) == "Hello there. Hi!"
    assert list(run.result().segments) == [
        Segment(500_000_000, 1_250_000_000, "Hello there.", speaker="S01").message(0),
        Segment(1_300_000_000, 2_000_000_000, "Hi!", speaker="S02").message(1),
    ]


def test_speakers_are_no_demand(transcriber: Transcriber) -> None:
    run = _Run(transcriber, pb.TranscriptRequest(), stream=False)
    assert run._without_speakers(SAID, Task(diarize=False)) == SAID
    assert run._without_speakers("Hello there.", Task(diarize=True)) == "Hello there."
    assert not run.result().segments


async def test_speakers_are_not_streamed(transcriber: Transcriber) -> None:
    with pytest.raises(Unsupported, match="AudioTranscriptionStream can't tell speakers apart"):
        await anext(transcriber.stream(pb.TranscriptRequest(diarize=True)))


async def test_closed(transcriber: Transcriber) -> None:
    assert await transcriber.in_thread(lambda: 1) == 1
    transcriber.close()
    with pytest.raises(EngineGone):
        await transcriber.in_thread(lambda: 1)
