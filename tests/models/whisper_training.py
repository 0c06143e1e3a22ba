"""How the toy Whisper learns its clips by heart, and how transformers hears what it says."""

import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from tests.models import MakeError, whisper

Model = Any  # transformers' classes are untyped

SEED = 3
STEPS = 500
LEARNING_RATE = 2e-3
WORST_LOSS = 0.02  # of any single token
NOISE = 0.05  # added to the spectrogram, so that a codec changes nothing
IGNORED = -100


def train(config: Any, tokenizer: Any, hearing: Any, folder: Path) -> Model:
    """A model that knows the lessons by heart, from the clips in `folder`."""
    names = sorted({lesson.name for lesson in whisper.LESSONS})
    features = torch.cat([_features(hearing, _sound(whisper.clip(folder, name))) for name in names])
    rows = [names.index(lesson.name) for lesson in whisper.LESSONS]
    ids, targets = _batch(tokenizer)
    wanted = targets != IGNORED
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = WhisperForConditionalGeneration(config).float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
        with tqdm(total=STEPS, desc="whisper", unit="step", file=sys.stderr) as steps:
            for _ in range(STEPS):
                heard = model.model.encoder(features + NOISE * torch.randn_like(features)).last_hidden_state
                logits = model(encoder_outputs=(heard[rows],), decoder_input_ids=ids).logits
                losses = cross_entropy(logits[wanted], targets[wanted], reduction="none")
                if losses.max().item() < WORST_LOSS:
                    steps.total = steps.n
                    return model.eval()
                losses.mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                steps.update()
                steps.set_postfix_str(f"loss {losses.mean().item():.4f}, of the worst token {losses.max().item():.3f}")
    raise MakeError(f"after {STEPS} steps the worst token still has a loss of {losses.max().item():.3f}")


def check(folder: Path) -> None:
    """Raise MakeError where the saved model does not say what it should."""
    for lesson in whisper.LESSONS:
        sound = _sound(whisper.clip(folder, lesson.name))
        said = decode(folder, greedy(folder, sound, whisper.prompt(lesson.language, lesson.task, lesson.previous)))
        if said != lesson.answer + whisper.EOS:
            raise MakeError(f"for {lesson.name} it should say {lesson.answer!r} and says {said!r}")


def greedy(folder: Path, sound: npt.NDArray[np.float32], prompt: str, limit: int = whisper.CONTEXT) -> list[int]:
    """The ids that transformers finds the likeliest after `prompt`, one by one in float32, EOS included.

    `sound` has 16 kHz and 30 seconds at most; there are at most `limit` tokens, those of the prompt included.
    """
    processor, model = _loaded(folder)
    step = processor.tokenizer.encode(prompt, add_special_tokens=False)
    limit -= len(step)
    said: list[int] = []
    with torch.no_grad():
        heard = model.model.encoder(_features(processor.feature_extractor, sound))
        cache = None
        while len(said) < limit and processor.tokenizer.eos_token_id not in said[-1:]:
            output = model(encoder_outputs=heard, decoder_input_ids=torch.tensor([step]), past_key_values=cache)
            cache, step = output.past_key_values, [int(output.logits[0, -1].argmax())]
            said += step
    return said


def generate(folder: Path, sound: npt.NDArray[np.float32], **options: Any) -> list[int]:
    """The ids of transformers' own transcription, with its rules about timestamps; prompt and EOS are not in it."""
    processor, model = _loaded(folder)
    said = model.generate(_features(processor.feature_extractor, sound), return_timestamps=True, **options)
    return [int(token) for token in said[0] if token != processor.tokenizer.eos_token_id]


def decode(folder: Path, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens and timestamps included."""
    processor, _ = _loaded(folder)
    # transformers' own adds up the timestamps.
    text: str = processor.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    return text


@lru_cache(maxsize=1)
def _loaded(folder: Path) -> tuple[Any, Model]:
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return WhisperProcessor.from_pretrained(folder), model.eval()


def _sound(file: Path) -> npt.NDArray[np.float32]:
    sound: npt.NDArray[np.float32] = soundfile.read(file, dtype="float32")[0]
    return sound


def _features(hearing: Any, sound: npt.NDArray[np.float32]) -> torch.Tensor:
    features: torch.Tensor = hearing(sound, sampling_rate=hearing.sampling_rate, return_tensors="pt").input_features
    return features


def _batch(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of all lessons, and what is to follow each; in a prompt, its language and its timestamp are."""
    rows: list[tuple[list[int], list[int]]] = []
    start = tokenizer.convert_tokens_to_ids(whisper.START)
    for lesson in whisper.LESSONS:
        prompt, answer = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (whisper.prompt(lesson.language, lesson.task, lesson.previous), lesson.answer + whisper.EOS)
        )
        targets = [IGNORED] * (len(prompt) - 1) + answer
        targets[prompt.index(start)] = prompt[prompt.index(start) + 1]
        targets[len(prompt) - 2] = prompt[-1]
        rows.append(((prompt + answer)[:-1], targets))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [tokenizer.eos_token_id] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([targets + [IGNORED] * (longest - len(targets)) for _, targets in rows])
