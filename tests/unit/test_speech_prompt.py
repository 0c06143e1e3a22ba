"""Prompts as vLLM's own model classes write them, of models that no test loads."""

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.speech_prompt import Prompter, Task, whisper_prompt
from common.transcript import Segment, diarized_segments

SOUND = np.zeros(16_000, np.float32)


def prompter(name: str, monkeypatch: pytest.MonkeyPatch, processor: Any = None, **config: Any) -> Prompter:
    """For a class whose prompts are text, so that it needs no tokenizer."""
    module_name, _, class_name = name.partition(":")
    module = importlib.import_module(f"vllm.model_executor.models.{module_name}")
    monkeypatch.setattr("common.speech_prompt.get_model_cls", lambda _config: getattr(module, class_name))
    if processor is not None:
        monkeypatch.setattr(module, "cached_processor_from_config", lambda _config: processor)
    usual = {"is_encoder_decoder": False, "max_model_len": 100, "try_get_generation_config": dict}
    llm: Any = SimpleNamespace(model_config=SimpleNamespace(**usual | config))
    return Prompter(llm)


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch) -> Prompter:
    return prompter("gemma3n_mm:Gemma3nForConditionalGeneration", monkeypatch)


@pytest.fixture
def moss(monkeypatch: pytest.MonkeyPatch) -> Prompter:
    processor = SimpleNamespace(feature_extractor=SimpleNamespace(sampling_rate=16_000))
    return prompter("moss_transcribe_diarize:MossTranscribeDiarizeForConditionalGeneration", monkeypatch, processor)


@pytest.mark.parametrize(
    ("text", "previous", "multilingual", "expected"),
    [
        (
            "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>",
            "",
            True,
            "<|startoftranscript|><|en|><|transcribe|><|0.00|>",
        ),
        (
            "<|prev|>Oslo, Bergen<|startoftranscript|><|de|><|translate|><|notimestamps|>",
            "Oslo, Bergen",
            True,
            "<|startofprev|> Oslo, Bergen<|startoftranscript|><|de|><|translate|><|0.00|>",
        ),
        ("<|startoftranscript|><|en|><|transcribe|><|notimestamps|>", "", False, "<|startoftranscript|><|0.00|>"),
    ],
)
def test_whisper(text: str, previous: str, multilingual: bool, expected: str) -> None:
    assert whisper_prompt(text, previous, multilingual=multilingual) == expected


def test_whisper_of_english_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hearing = SimpleNamespace(chunk_length=30, sampling_rate=16_000)
    english = prompter(
        "whisper:WhisperForConditionalGeneration",
        monkeypatch,
        SimpleNamespace(feature_extractor=hearing),
        is_encoder_decoder=True,
        try_get_generation_config=GenerationConfig(is_multilingual=False).to_diff_dict,
    )
    task = english.task(pb.TranscriptRequest(prompt="Oslo"))
    english.check(task)
    assert (task.language, task.timed, english.detects) == ("en", True, False)
    (prompt,) = english.prompts(task, [SOUND])
    assert prompt["decoder_prompt"]["prompt"] == "<|startofprev|> Oslo<|startoftranscript|><|0.00|>"
    with pytest.raises(InvalidRequest, match=r"^language: 'de' is no language of this model; it has en$"):
        english.task(pb.TranscriptRequest(language="de"))
    with pytest.raises(InvalidRequest, match=r"^translate: the loaded model only transcribes"):
        english.check(english.task(pb.TranscriptRequest(translate=True)))


def test_a_model_that_chats(gemma: Prompter) -> None:
    task = gemma.task(pb.TranscriptRequest(language="de", translate=True, diarize=True))
    gemma.check(task)
    (prompt,) = gemma.prompts(task, [SOUND])
    assert "Translate this audio from German into English" in prompt["prompt"]
    (prompt,) = gemma.prompts(Task(), [SOUND])
    assert "Transcribe this audio:" in prompt["prompt"]
    assert not gemma.has_timestamps
    assert not gemma.detects


def test_a_text_that_has_no_place(gemma: Prompter) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: the loaded model takes no text before the audio"):
        gemma.check(gemma.task(pb.TranscriptRequest(prompt="Names: Ann")))


def test_a_model_that_only_transcribes(moss: Prompter) -> None:
    moss.check(moss.task(pb.TranscriptRequest(language="en", prompt="Who says what?")))
    with pytest.raises(InvalidRequest, match=r"^translate: the loaded model only transcribes"):
        moss.check(moss.task(pb.TranscriptRequest(language="en", translate=True)))


def test_speakers(moss: Prompter) -> None:
    said = "[0.5][S01]Hello there.[1.25][1.30][S02]Hi![62.0]"
    assert diarized_segments(moss.model_class.parse_diarized_transcript(said)) == [
        Segment(500_000_000, 1_250_000_000, "Hello there.", speaker="S01"),
        Segment(1_300_000_000, 62_000_000_000, "Hi!", speaker="S02"),
    ]


def test_a_language_of_other_models(gemma: Prompter) -> None:
    unknown = min(gemma.model_class.get_other_languages())
    with pytest.raises(InvalidRequest, match=f"^language: '{unknown}' is no language of this model; it has "):
        gemma.task(pb.TranscriptRequest(language=unknown))


@pytest.mark.parametrize(("context", "most"), [(100, 6400), (65_536, 16_384)])
def test_a_long_text(monkeypatch: pytest.MonkeyPatch, context: int, most: int) -> None:
    gemma = prompter("gemma3n_mm:Gemma3nForConditionalGeneration", monkeypatch, max_model_len=context)
    gemma.task(pb.TranscriptRequest(prompt="x" * most))
    with pytest.raises(InvalidRequest, match=f"^prompt: has {most + 1} characters; use at most {most}$"):
        gemma.task(pb.TranscriptRequest(prompt="x" * (most + 1)))


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "Ann<|im_end|>\n", "<|a b|>", "<||>", "<|im<|x|>_end|>", "<asr_text>", "<asr_te<asr_text>xt>"],
)
def test_control_tokens(moss: Prompter, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: has words of the form <\|...\|> or <asr_text>, which"):
        moss.task(pb.TranscriptRequest(language="en", prompt=f"Names: {text} Bob"))


@pytest.mark.parametrize("text", ["a < b | c > d", "<|im_end", "im_end|>", "<| | |>", "asr_text"])
def test_no_control_tokens(moss: Prompter, text: str) -> None:
    assert moss.task(pb.TranscriptRequest(language="en", prompt=text)).previous == text
