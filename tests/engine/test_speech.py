"""Transcription by a toy Whisper that knows its clips by heart, and what transformers hears in others."""

from typing import Any

import pytest

from common.model import Model
from common.pb import backend_pb2 as pb
from tests.engine.conftest import Engines
from tests.models import ensure, whisper
from tests.models.whisper import LESSONS, SECONDS, Lesson

SECOND = 1_000_000_000
BY_NAME = {lesson.name: lesson for lesson in reversed(LESSONS)}
ALL = pytest.mark.parametrize(
    "lesson",
    LESSONS,
    ids=lambda lesson: "-".join(filter(None, (lesson.name, lesson.task, lesson.previous and "after"))),
)


@pytest.fixture
async def whisperer(engines: Engines) -> Model:
    return await engines.get(Model=str(ensure("whisper")), MaxModelLen=0)


def request(lesson: Lesson, **fields: Any) -> pb.TranscriptRequest:
    """As the orchestrator asks: speakers wanted, the language left open."""
    usual: dict[str, Any] = {
        "dst": str(whisper.clip(ensure("whisper"), lesson.name)),
        "translate": lesson.task == "translate",
        "prompt": lesson.previous,
        "diarize": True,
        "threads": 4,
    }
    return pb.TranscriptRequest(**usual | fields)


def expected(lesson: Lesson, offset: int = 0) -> list[tuple[int, int, str]]:
    return [(offset + round(start * SECOND), offset + round(end * SECOND), text) for start, text, end in lesson.phrases]


def times(result: pb.TranscriptResult) -> list[tuple[int, int, str]]:
    return [(segment.start, segment.end, segment.text) for segment in result.segments]


async def streamed(model: Model, wanted: pb.TranscriptRequest) -> tuple[list[str], pb.TranscriptResult]:
    """The deltas, and the result, which must come last and alone."""
    *deltas, last = [response async for response in model.transcribe_stream(wanted)]
    assert all(delta.delta and not delta.HasField("final_result") for delta in deltas)
    assert last.HasField("final_result")
    assert not last.delta
    return [delta.delta for delta in deltas], last.final_result


@ALL
async def test_to_the_letter(whisperer: Model, lesson: Lesson) -> None:
    result = await whisperer.transcribe(request(lesson))
    assert result.text == lesson.text
    assert result.language == lesson.language
    assert result.duration == SECONDS
    assert times(result) == expected(lesson)
    assert [segment.id for segment in result.segments] == list(range(len(lesson.phrases)))
    assert not result.eou
    for segment in result.segments:
        assert whisperer._engine.llm.get_tokenizer().decode(segment.tokens) == segment.text
        assert (segment.speaker, list(segment.words)) == ("", [])
