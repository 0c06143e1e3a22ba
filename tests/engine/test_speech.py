"""Transcription by a toy Whisper that knows its clips by heart, and what transformers hears in others."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

from common.errors import InvalidRequest, Overloaded, Unsupported
from common.model import Model
from common.pb import backend_pb2 as pb
from common.transcript import timed_segments
from tests.engine.conftest import Engines
from tests.models import ensure, whisper
from tests.models.whisper import LESSONS, SECONDS, Lesson
from tests.voice import RATE, say

SECOND = 1_000_000_000
Samples = npt.NDArray[np.float32]


def name(lesson: Lesson) -> str:
    return "-".join(filter(None, (lesson.name, lesson.task, lesson.previous and "after a text")))


BY_NAME = {name(lesson): lesson for lesson in LESSONS}
KETTLE, TRAIN, ZUG, BIRDS = (BY_NAME[f"{each}-transcribe"] for each in ("kettle", "train", "zug", "birds"))
ALL = pytest.mark.parametrize("lesson", LESSONS, ids=name)


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


def samples(lesson: Lesson) -> Samples:
    found: Samples = soundfile.read(whisper.clip(ensure("whisper"), lesson.name), dtype="float32")[0]
    return found


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


async def refused(model: Model, wanted: pb.TranscriptRequest) -> str:
    """The reason, the same from both RPCs, and nothing is left of the request."""
    with pytest.raises(InvalidRequest) as caught:
        await model.transcribe(wanted)
    with pytest.raises(InvalidRequest) as again:
        await streamed(model, wanted)
    assert str(again.value) == str(caught.value)
    assert model.running_requests == 0
    return str(caught.value)


@ALL
async def test_to_the_letter(whisperer: Model, lesson: Lesson) -> None:
    result = await whisperer.transcribe(request(lesson))
    assert result.text == lesson.text
    assert result.language == lesson.language  # detected
    assert result.duration == SECONDS
    assert times(result) == expected(lesson)
    assert [segment.id for segment in result.segments] == list(range(len(lesson.phrases)))
    assert not result.eou
    for segment in result.segments:
        assert whisperer._engine.llm.get_tokenizer().decode(segment.tokens) == segment.text
        assert (segment.speaker, list(segment.words)) == ("", [])


@ALL
async def test_streamed_is_whole(whisperer: Model, lesson: Lesson) -> None:
    deltas, result = await streamed(whisperer, request(lesson, stream=True))
    assert "".join(deltas) == result.text == lesson.text
    assert result == await whisperer.transcribe(request(lesson))
    assert len(deltas) > 3 or not lesson.text


async def test_language_is_heeded(whisperer: Model) -> None:
    assert (await whisperer.transcribe(request(ZUG, language="de"))).text == ZUG.text
    # Told that it is English, it does not detect.
    assert (await whisperer.transcribe(request(ZUG, language="en"))).language == "en"
    # OpenAI promises less than the model has.
    assert (await whisperer.transcribe(request(ZUG, language="yue"))).language == "yue"


@pytest.mark.parametrize("granularities", [["segment"], ["word"], ["segment", "word"]])
async def test_granularities(whisperer: Model, granularities: list[str]) -> None:
    result = await whisperer.transcribe(request(KETTLE, timestamp_granularities=granularities))
    assert times(result) == expected(KETTLE)


@pytest.mark.parametrize(
    ("form", "rate"),
    [
        ({"format": "WAV", "subtype": "PCM_16"}, 16_000),
        ({"format": "WAV", "subtype": "FLOAT"}, 44_100),
        ({"format": "FLAC"}, 48_000),
        ({"format": "OGG", "subtype": "VORBIS"}, 44_100),
        ({"format": "MP3"}, 16_000),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else value["format"],
)
async def test_codecs(whisperer: Model, tmp_path: Path, form: dict[str, str], rate: int) -> None:
    import soxr

    for lesson in (KETTLE, ZUG):
        file = tmp_path / f"{lesson.name}.{form['format'].lower()}"
        soundfile.write(file, soxr.resample(samples(lesson), RATE, rate), rate, **form)
        result = await whisperer.transcribe(request(lesson, dst=str(file), language=lesson.language))
        assert (result.text, times(result)) == (lesson.text, expected(lesson))


LONG = (KETTLE, TRAIN, BIRDS)


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that vLLM takes apart again: the last second of 30 is silence, and so it cuts where that begins."""
    pieces = [np.concatenate([samples(lesson), np.zeros(24 * RATE, np.float32)]) for lesson in LONG]
    file = tmp_path_factory.mktemp("long") / "long.flac"
    soundfile.write(file, np.concatenate([*pieces[:-1], samples(LONG[-1])]), RATE, subtype="PCM_16")
    return file


async def most_running(model: Model, work: "asyncio.Task[Any]") -> int:
    """The most requests that the engine had at a time while `work` was done."""
    most = 0
    while not work.done():
        most = max(most, model.running_requests)
        await asyncio.sleep(0.001)
    return most


async def test_a_long_file(whisperer: Model, long_file: Path) -> None:
    wanted = request(KETTLE, dst=str(long_file))
    work = asyncio.create_task(whisperer.transcribe(wanted))
    assert await most_running(whisperer, work) == len(LONG)
    result = work.result()
    assert result.text == " ".join(lesson.text for lesson in LONG)
    assert result.language == "en"
    assert result.duration == 58 + SECONDS
    assert times(result) == [
        part for index, lesson in enumerate(LONG) for part in expected(lesson, index * 29 * SECOND)
    ]
    assert [segment.id for segment in result.segments] == list(range(len(result.segments)))

    deltas, again = await streamed(whisperer, wanted)
    assert again == result
    assert "".join(deltas) == result.text
    assert len(deltas) > 10


UNHEARD: dict[str, Callable[[], Samples]] = {
    "sentence": lambda: say("The quick brown fox jumps over the lazy dog."),
    "German": lambda: say("Wer anderen eine Grube gräbt, fällt selbst hinein.", "de"),
    "French": lambda: say("Il fait beau aujourd'hui, n'est-ce pas?", "fr"),
    "long sentence": lambda: say("It was a bright cold day in April, and the clocks were striking thirteen. " * 4),
    "tone": lambda: np.sin(np.arange(3 * RATE) / 5).astype(np.float32),
    "noise": lambda: np.random.default_rng(1).normal(0, 0.1, 7 * RATE).astype(np.float32),
    "thirty seconds": lambda: np.random.default_rng(2).normal(0, 0.1, 30 * RATE).astype(np.float32),
    "a sample": lambda: np.full(1, 0.5, np.float32),
}


@pytest.mark.parametrize("sound", UNHEARD)
@pytest.mark.parametrize(
    "asked", [("en", "transcribe", ""), ("fr", "translate", "Names: Ann")], ids=lambda asked: asked[1]
)
async def test_transformers_hears_the_same(
    whisperer: Model, tmp_path: Path, sound: str, asked: tuple[str, str, str]
) -> None:
    """What it was not taught makes it write gibberish, which hangs on every number in it."""
    from tests.models import whisper_training

    file = tmp_path / "a.wav"
    soundfile.write(file, UNHEARD[sound](), RATE, subtype="PCM_16")
    heard: Samples = soundfile.read(file, dtype="float32")[0]
    language, task, previous = asked
    ids = whisper_training.greedy(ensure("whisper"), heard, whisper.prompt(language, task, previous))
    tokenizer = whisperer._engine.llm.get_tokenizer()
    wanted = request(KETTLE, dst=str(file), language=language, translate=task == "translate", prompt=previous)
    result = await whisperer.transcribe(wanted)
    assert [(segment.start, segment.end, list(segment.tokens)) for segment in result.segments] == [
        (segment.start, segment.end, segment.tokens)
        for segment in timed_segments(
            ids,
            first_timestamp=tokenizer.convert_tokens_to_ids("<|0.00|>"),
            eos=tokenizer.eos_token_id,
            start=0,
            end=len(heard) * SECOND // RATE,
            decode=tokenizer.decode,
        )
    ]
    assert "".join(segment.text for segment in result.segments).strip() == result.text


@ALL
async def test_transformers_own_rules(whisperer: Model, lesson: Lesson) -> None:
    """What transformers' `generate` makes of its rules for timestamps, the model knows by itself."""
    from tests.models import whisper_training

    options: dict[str, Any] = {"language": lesson.language, "task": lesson.task}
    tokenizer = whisperer._engine.llm.get_tokenizer()
    if lesson.previous:
        options["prompt_ids"] = tokenizer.get_prompt_ids(lesson.previous, return_tensors="pt")
    ids = whisper_training.generate(ensure("whisper"), samples(lesson), **options)
    result = await whisperer.transcribe(request(lesson))
    texts = [token for token in ids if token < tokenizer.eos_token_id]
    assert [token for segment in result.segments for token in segment.tokens] == texts


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -0.1}, "temperature: -0.1 is not from 0 to 2"),
        ({"temperature": 2.1}, "temperature: 2.1 is not from 0 to 2"),
        ({"temperature": float("nan")}, "temperature: nan is not from 0 to 2"),
        ({"temperature": float("inf")}, "temperature: inf is not from 0 to 2"),
        ({"timestamp_granularities": ["word", "phrase"]}, "timestamp_granularities[1]: 'phrase' is none of segment,"),
        ({"language": "xx"}, "language: 'xx' is no language of this model; it has af, am, "),
        ({"language": "English"}, "language: 'English' is no language of this model; it has "),
        ({"language": "en-US"}, "language: 'en-US' is no language of this model; it has "),
        ({"prompt": "a<|endoftext|>b"}, "prompt: has words of the form <|...|>"),
        ({"prompt": "x" * 223}, "prompt: has 224 tokens; 223 are allowed"),  # the space before it is one
        ({"prompt": "x" * 10_000_000}, "prompt: has 10000000 characters; use at most 16384"),
        ({"dst": ""}, "dst: must be the absolute path of an audio file"),
        ({"dst": "/nowhere/a.wav"}, "dst: there is no file '/nowhere/a.wav' on this machine"),
        ({"dst": __file__}, "dst: can't be decoded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_what_is_refused(whisperer: Model, fields: dict[str, Any], words: str) -> None:
    reason = await refused(whisperer, request(KETTLE, **fields))
    assert reason.startswith(words)


async def test_the_longest_prompt(whisperer: Model) -> None:
    assert (await whisperer.transcribe(request(KETTLE, prompt="x" * 222))).language == "en"


async def test_temperature(whisperer: Model, tmp_path: Path) -> None:
    """The model is sure of its clips, and of nothing else."""
    assert (await whisperer.transcribe(request(KETTLE, temperature=0.2))).text == KETTLE.text
    file = tmp_path / "a.wav"
    soundfile.write(file, UNHEARD["noise"](), RATE, subtype="PCM_16")
    for temperature, texts in ((0, {1}), (2, {2, 3, 4})):
        unsure = request(KETTLE, dst=str(file), language="fr", temperature=temperature)
        results = await asyncio.gather(*(whisperer.transcribe(unsure) for _ in range(4)))
        assert len({result.text for result in results}) in texts


async def test_many_at_once(whisperer: Model) -> None:
    results = await asyncio.gather(*(whisperer.transcribe(request(lesson)) for lesson in LESSONS))
    assert [result.text for result in results] == [lesson.text for lesson in LESSONS]


@pytest.fixture
def endless(tmp_path: Path) -> pb.TranscriptRequest:
    """Ten clips of noise, about which the model writes much."""
    file = tmp_path / "long.wav"
    soundfile.write(file, np.random.default_rng(3).normal(0, 0.1, 290 * RATE), RATE, subtype="PCM_16")
    return request(KETTLE, dst=str(file), language="fr")


async def test_a_caller_who_goes_away(whisperer: Model, endless: pb.TranscriptRequest) -> None:
    for pause in (0, 0.02, 0.3, None):
        task = asyncio.create_task(whisperer.transcribe(endless))
        running = 0
        while pause is None and running < 10 and not task.done():
            running = whisperer.running_requests
            await asyncio.sleep(0)
        await asyncio.sleep(pause or 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert whisperer.running_requests == 0


async def test_a_stream_that_is_closed(whisperer: Model, long_file: Path) -> None:
    stream = whisperer.transcribe_stream(request(KETTLE, dst=str(long_file)))
    assert (await anext(stream)).delta
    assert whisperer.running_requests > 1
    await stream.aclose()
    assert whisperer.running_requests == 0


async def test_admission(
    whisperer: Model, long_file: Path, endless: pb.TranscriptRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, long = whisperer._engine.llm.scheduler_config, request(KETTLE, dst=str(long_file))
    monkeypatch.setattr(scheduler, "max_num_queued_reqs", 10)
    work = asyncio.create_task(whisperer.transcribe(endless))
    while whisperer.running_requests < 10:  # noqa: ASYNC110  # the engine has no event for it
        await asyncio.sleep(0.001)
    with pytest.raises(Overloaded, match="no more are admitted"):
        await whisperer.transcribe(request(KETTLE))
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    # Three clips at once will always be one too many.
    monkeypatch.setattr(scheduler, "max_num_queued_reqs", 2)
    assert (await whisperer.transcribe(request(KETTLE))).text == KETTLE.text
    for each, clips in ((long, 3), (endless, 10)):
        words = f"dst: would be {clips} requests at a time; 2 are admitted (--max-waiting-requests)"
        assert await refused(whisperer, each) == words
    # Each has a prompt of four tokens.
    monkeypatch.setattr(scheduler, "max_num_queued_reqs", 10)
    monkeypatch.setattr(scheduler, "max_num_queued_tokens", 8)
    words = "dst: would be 9 prompt tokens or more at a time; 8 are admitted (--max-waiting-tokens)"
    assert await refused(whisperer, long) == words
    monkeypatch.setattr(scheduler, "max_num_queued_tokens", 9)
    assert (await whisperer.transcribe(long)).text


async def test_nothing_said_is_logged(whisperer: Model, caplog: pytest.LogCaptureFixture, long_file: Path) -> None:
    with caplog.at_level(logging.INFO):
        await whisperer.transcribe(request(BY_NAME["train-transcribe-after a text"]))
        await streamed(whisperer, request(KETTLE, dst=str(long_file)))
    text = caplog.text.lower()
    assert not any(word in text for word in ("kettle", "oslo", "birds", "capitals"))


async def test_it_only_transcribes(whisperer: Model) -> None:
    with pytest.raises(Unsupported, match="the loaded model transcribes speech"):
        await whisperer.predict(pb.PredictOptions(Prompt="Hello"))


async def test_the_adapter_is_heeded(engines: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes another model of it: the one whose weights have it merged."""
    folder, wanted = ensure("glm_asr"), request(KETTLE, language="en")
    model = await engines.get(Model=str(folder / "merged"))
    merged = await model.transcribe(wanted)
    model = await engines.get(Model=str(folder / "base"), LoraAdapter=str(folder / "adapter"))
    assert await model.transcribe(wanted) == merged
    assert (await streamed(model, wanted))[1] == merged
    monkeypatch.setattr(model._transcriber, "adapter", None)
    assert await model.transcribe(wanted) != merged
