"""What a speech model is asked: `TranscriptRequest`, checked, and a clip's prompt, as the model's class writes it."""

import dataclasses
import functools
import math
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import SpeechToTextConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.model_executor.model_loader import get_model_cls
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.async_llm import AsyncLLM

from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb

GRANULARITIES = ("segment", "word")
MAX_TEMPERATURE = 2
TRANSLATED_INTO = "en"
# In characters. vLLM's classes tokenise a prompt for each clip, one caller at a time, and keep the last 2,048.
MOST_PROMPT = 16 * 1024
# Likewise, generously: what has more than a context of these is not worth tokenising.
_LONGEST_TOKEN = 64
# Whisper's control tokens, as vLLM writes them into its prompts.
FIRST_TIMESTAMP = "<|0.00|>"
_START, _PREVIOUS, _NO_TIMESTAMPS = "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"
# Of any model. vLLM takes them out of Qwen3-ASR's prompts until none is left, in time that grows with the square of the
# length where they are nested, and leaves them in those of others, as the end of a turn.
_CONTROL = re.compile(r"<\|[^|]*\|>|<asr_text>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is asked for.

    Attributes:
        language: an ISO 639-1 code; None where it isn't known.
        translate: into English.
        previous: text before the audio; "" for none.
        temperature: of the sampling; 0 is greedy.
        diarize: whether speakers are told apart, where the model can.
        timed: whether the model writes when each phrase begins and ends.

    """

    language: str | None = None
    translate: bool = False
    previous: str = ""
    temperature: float = 0
    diarize: bool = False
    timed: bool = False

    @property
    def name(self) -> str:
        """vLLM's name of it."""
        return "translate" if self.translate else "transcribe"


class Prompter:
    """Writes the prompts of one model. Its methods may read files of the model on first use, and so block."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._config = llm.model_config
        # vLLM's models write their prompts with tokenizers that are for one thread at a time.
        self._lock = threading.Lock()
        self.model_class: Any = get_model_cls(self._config)

    def task(self, request: pb.TranscriptRequest) -> Task:
        """What `request` asks for, as far as can be checked without a prompt.

        Raises:
            InvalidRequest: a value is out of its range, the model doesn't know the language, or the text before the
                audio is too long or has control tokens.

        """
        for index, granularity in enumerate(request.timestamp_granularities):
            if granularity not in GRANULARITIES:
                raise InvalidRequest(
                    f"timestamp_granularities[{index}]", f"{granularity!r} is none of {', '.join(GRANULARITIES)}"
                )
        if not (math.isfinite(request.temperature) and 0 <= request.temperature <= MAX_TEMPERATURE):
            raise InvalidRequest("temperature", f"{request.temperature:g} is not from 0 to {MAX_TEMPERATURE}")
        if request.language and request.language not in self.languages:
            known = ", ".join(sorted(self.languages))
            raise InvalidRequest("language", f"{request.language[:16]!r} is no language of this model; it has {known}")
        most = min(MOST_PROMPT, self._config.max_model_len * _LONGEST_TOKEN)
        if len(request.prompt) > most:
            raise InvalidRequest("prompt", f"has {len(request.prompt)} characters; use at most {most}")
        if _CONTROL.search(request.prompt):
            raise InvalidRequest("prompt", "has words of the form <|...|> or <asr_text>, which are control tokens")
        language = request.language or (None if self.multilingual else TRANSLATED_INTO)
        return Task(
            language=language,
            translate=request.translate,
            previous=request.prompt.strip(),
            temperature=round(request.temperature, 6),
            diarize=request.diarize,
            timed=self.has_timestamps,
        )

    def check(self, task: Task) -> None:
        """Return where the model's prompt can say what `task` asks for; a field that has no effect is refused.

        Raises:
            InvalidRequest: the model can't translate, or takes no text before the audio.

        """
        if task.translate and not (self.multilingual and self._heeds(Task(language="de"), translate=True)):
            raise InvalidRequest("translate", "the loaded model only transcribes; leave it unset")
        if not task.previous:
            return
        bare = dataclasses.replace(task, previous="", language=task.language or TRANSLATED_INTO)
        if not self._heeds(bare, previous="Names:"):
            raise InvalidRequest("prompt", "the loaded model takes no text before the audio; leave it unset")

    def prompts(self, task: Task, clips: Sequence[npt.NDArray[np.float32]]) -> list[Any]:
        """A prompt for each clip, as vLLM's renderer takes it.

        Raises:
            ValueError: the model's class refuses the task; mostly for want of a language.

        """
        with self._lock:
            return [self._prompt(task, clip) for clip in clips]

    def detection(self, clip: npt.NDArray[np.float32]) -> Any:
        """The prompt that makes the model write the language of a clip."""
        return parse_model_prompt(
            self._config, self.model_class.get_language_detection_prompt(clip, self.speech_config(Task()))
        )

    def speech_config(self, task: Task) -> SpeechToTextConfig:
        """How the model hears: at which rate, how long at a time."""
        return self.model_class.get_speech_to_text_config(self._config, task.name)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's."""
        return self._llm.get_tokenizer()

    @functools.cached_property
    def multilingual(self) -> bool:
        """Whether there is more than English to it; the English-only models of Whisper have prompts of their own."""
        return bool(self._config.try_get_generation_config().get("is_multilingual", True))

    @property
    def detects(self) -> bool:
        """Whether the model can be asked for the language beforehand."""
        return bool(self.model_class.supports_explicit_language_detection and self.multilingual)

    @functools.cached_property
    def language_tokens(self) -> list[int]:
        """The ids of the languages that it can detect."""
        unknown = (None, self.tokenizer.unk_token_id)
        ids = self.model_class.get_language_token_ids(self.tokenizer)
        return [token for token in ids if token not in unknown]

    @functools.cached_property
    def languages(self) -> frozenset[str]:
        """The codes of the languages that a request may name."""
        if not self.multilingual:
            return frozenset({TRANSLATED_INTO})
        codes = set(self.model_class.supported_languages)
        if self.model_class.supports_explicit_language_detection:
            # vLLM lists those that OpenAI's server promises; the model has tokens for more.
            codes |= set(self.model_class.get_other_languages())
            vocabulary = self.tokenizer.get_vocab()
            codes = {code for code in codes if f"<|{code}|>" in vocabulary}
        return frozenset(codes)

    @functools.cached_property
    def has_timestamps(self) -> bool:
        """Whether it writes when each phrase begins and ends, as tokens between them."""
        (prompt,) = self.prompts(Task(language=TRANSLATED_INTO), [self._silence])
        return _decoder_text(prompt) is not None

    @property
    def first_timestamp(self) -> int:
        """The id of the first timestamp, where it has them; the later ones follow."""
        return int(self.tokenizer.convert_tokens_to_ids(FIRST_TIMESTAMP))

    @property
    def start_token(self) -> int:
        """The id after which Whisper's answer is prepared; what stands before it is previous text."""
        return int(self.tokenizer.convert_tokens_to_ids(_START))

    def _heeds(self, task: Task, **change: Any) -> bool:
        """Whether a change of the task changes the prompt."""
        (before,) = self.prompts(task, [self._silence])
        (after,) = self.prompts(dataclasses.replace(task, **change), [self._silence])
        return bool(_without_sound(before) != _without_sound(after))

    @property
    def _silence(self) -> npt.NDArray[np.float32]:
        return np.zeros(int(self.speech_config(Task()).sample_rate), np.float32)

    def _prompt(self, task: Task, clip: npt.NDArray[np.float32]) -> Any:
        written = self.model_class.get_generation_prompt(
            SpeechToTextParams(
                audio=clip,
                stt_config=self.speech_config(task),
                model_config=self._config,
                language=task.language,
                task_type=task.name,
                request_prompt=task.previous,
                to_language=TRANSLATED_INTO if task.translate else None,
            )
        )
        prompt = parse_model_prompt(self._config, written)
        if (text := _decoder_text(prompt)) is not None:
            prompt["decoder_prompt"]["prompt"] = whisper_prompt(text, task.previous, multilingual=self.multilingual)
        return prompt


def whisper_prompt(text: str, previous: str, *, multilingual: bool) -> str:
    """vLLM's prompt for Whisper's decoder, so that it writes timestamps, after `previous`.

    vLLM announces a previous text by <|prev|>, which is no token. English-only models know no language and no task.
    """
    controls = text.rpartition(_START)[2].replace(_NO_TIMESTAMPS, FIRST_TIMESTAMP)
    begin = f"{_PREVIOUS} {previous}" if previous else ""
    return begin + _START + (controls if multilingual else FIRST_TIMESTAMP)


def _decoder_text(prompt: Any) -> str | None:
    """The text for Whisper's decoder; None in the prompt of any other model."""
    decoder = prompt.get("decoder_prompt")
    text = decoder.get("prompt") if isinstance(decoder, dict) else None
    return text if isinstance(text, str) and (_NO_TIMESTAMPS in text or FIRST_TIMESTAMP in text) else None


def _without_sound(prompt: Any) -> Any:
    if not isinstance(prompt, dict):
        return prompt
    return {name: _without_sound(part) for name, part in prompt.items() if name != "multi_modal_data"}
