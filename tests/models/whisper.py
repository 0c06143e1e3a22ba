"""A toy Whisper (1 layer of hearing, 2 of text, 128 wide) that knows a few clips of espeak-ng by heart.

`LESSONS` is what it says, and `clip` the sound that it says it to, kept in the model's folder: espeak-ng does not
speak a sentence twice in the same way. It hears with 16 mel bins, and otherwise as the real ones do: 30 seconds at a
time, at 16 kHz, with a multilingual tokenizer, timestamps of 20 ms and languages to detect.

Each token that it knows has a probability above 0.98, also when the clip comes through a lossy codec.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.models import MakeError

MEL_BINS = 16
WIDTH = 128
CONTEXT = 448
VOCABULARY = 400  # before special tokens
TIMESTAMPS = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
EOS, START, PREVIOUS, NO_TIMESTAMPS = "<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"
TASKS = ("translate", "transcribe")


@dataclass(frozen=True)
class Lesson:
    """A clip and what is in it: phrases, each with its start and end in seconds, which are learned, not measured."""

    name: str
    language: str
    phrases: tuple[tuple[float, str, float], ...]
    task: str = "transcribe"
    previous: str = ""

    @property
    def text(self) -> str:
        """The transcript as one text."""
        return "".join(phrase for _, phrase, _ in self.phrases).strip()

    @property
    def answer(self) -> str:
        """What the model says after the first timestamp, 0.00: phrases and timestamps in turn."""
        said = "".join(f"<|{start:.2f}|>{phrase}<|{end:.2f}|>" for start, phrase, end in self.phrases)
        return said.removeprefix("<|0.00|>")


LESSONS = (
    Lesson("kettle", "en", ((0.0, " The kettle is on.", 0.9), (1.1, " Who wants tea?", 2.1))),
    Lesson("train", "en", ((0.0, " The train to Oslo leaves at nine, not at ten.", 2.9),)),
    Lesson("train", "en", ((0.0, " THE TRAIN TO OSLO LEAVES AT NINE, NOT AT TEN.", 2.9),), previous="In capitals:"),
    Lesson("zug", "de", ((0.0, " Der Zug fährt über die Brücke.", 1.7), (1.7, " Schön!", 2.3))),
    Lesson("zug", "de", ((0.0, " The train crosses the bridge.", 1.7), (1.7, " Nice!", 2.3)), "translate"),
    Lesson("birds", "en", ((0.0, " Seven birds sat 🐦 on a wire.", 2.0), (2.0, " One flew away.", 3.1))),
    Lesson("silence", "en", ()),
)
SECONDS = 5.0  # of each clip
LEAD = 1.0  # of silence at its begin; the rest of it is at the end
# What is spoken, where it isn't the transcript.
SPOKEN = {"birds": "Seven birds sat on a wire. One flew away.", "silence": ""}

Tokenizer = Any  # transformers' classes are untyped


def clip(folder: Path, name: str) -> Path:
    """The WAV of a lesson: one channel of 16 bits, 16 kHz."""
    return folder / "clips" / f"{name}.wav"


def prompt(language: str, task: str = "transcribe", previous: str = "") -> str:
    """What the decoder is given before it writes."""
    return (f"{PREVIOUS} {previous}" if previous else "") + f"{START}<|{language}|><|{task}|><|0.00|>"


def make(into: Path) -> None:
    """Fill `into` with the model and its clips: float32 safetensors, 3 MB."""
    try:
        from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperProcessor

        from tests.models import whisper_training
    except ImportError as error:
        raise MakeError(f"{error}. It needs the extra `test`.") from error
    tokenizer = _tokenizer()
    hearing = WhisperFeatureExtractor(feature_size=MEL_BINS)
    ids = tokenizer.convert_tokens_to_ids
    special = {
        "bos_token_id": ids(EOS),
        "eos_token_id": ids(EOS),
        "pad_token_id": ids(EOS),
        "decoder_start_token_id": ids(START),
    }
    config = WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        vocab_size=len(tokenizer),
        num_mel_bins=MEL_BINS,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_target_positions=CONTEXT,
        init_std=0.06,
        **special,
    )
    _speak(into)
    model = whisper_training.train(config, tokenizer, hearing, into)
    model.generation_config = GenerationConfig(
        max_length=CONTEXT,
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": ids(f"<|{code}|>") for code in _languages()},
        task_to_id={task: ids(f"<|{task}|>") for task in TASKS},
        no_timestamps_token_id=ids(NO_TIMESTAMPS),
        prev_sot_token_id=ids(PREVIOUS),
        return_timestamps=False,
        **special,
    )
    model.save_pretrained(into)
    WhisperProcessor(hearing, tokenizer).save_pretrained(into)
    hearing.save_pretrained(into)
    whisper_training.check(into)


def _languages() -> list[str]:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return list(LANGUAGES)


def _speak(into: Path) -> None:
    import numpy as np
    import soundfile

    from tests.voice import RATE, say

    (into / "clips").mkdir()
    for lesson in LESSONS:
        file = clip(into, lesson.name)
        if not file.exists():
            text = SPOKEN.get(lesson.name, lesson.text)
            sound = np.zeros(round(SECONDS * RATE), np.float32)
            if text:
                spoken = say(text, lesson.language)
                begin = round(LEAD * RATE)
                sound[begin : begin + len(spoken)] = spoken
            soundfile.write(file, sound, RATE, subtype="PCM_16")


def _tokenizer() -> Tokenizer:
    """Whisper's, with a small byte-level BPE for the text and all special tokens of the real one, in its order."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, WhisperTokenizer

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([lesson.text for lesson in LESSONS if lesson.text.isascii()] * 2, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = WhisperTokenizer(
        vocab=learned["vocab"], merges=[tuple(pair) for pair in learned["merges"]], model_max_length=CONTEXT
    )
    languages = [f"<|{code}|>" for code in _languages()]
    tasks = [f"<|{task}|>" for task in TASKS]
    special = [START, *languages, *tasks, "<|startoflm|>", PREVIOUS, "<|nospeech|>", NO_TIMESTAMPS]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TIMESTAMPS])
    tokenizer.set_prefix_tokens()
    return tokenizer
