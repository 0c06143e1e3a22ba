"""What a speech model writes -> a transcript: one text out of its clips, and segments out of Whisper's timestamps."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from common.pb import backend_pb2 as pb

# Of Whisper's timestamp tokens, in nanoseconds.
STEP = 20_000_000
_SECOND = 1_000_000_000
_TIMESTAMPS = re.compile(r"<\|\d+\.\d\d\|>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Segment:
    """A stretch of a transcript; times in nanoseconds."""

    start: int
    end: int
    text: str
    tokens: list[int] = field(default_factory=list)
    speaker: str = ""

    def message(self, index: int) -> pb.TranscriptSegment:
        """Its message, as the one at `index`."""
        return pb.TranscriptSegment(
            id=index, start=self.start, end=self.end, text=self.text, tokens=self.tokens, speaker=self.speaker
        )


class Text:
    """The text of a transcript while it grows: those of its clips, without the space around them, and a separator.

    What `add` returns is what `whole` has more than before.
    """

    def __init__(self, separator: str = " ") -> None:
        self._separator = separator
        self._whole: list[str] = []
        self._space = ""
        self._at_begin = True

    @property
    def whole(self) -> str:
        """All so far."""
        return "".join(self._whole)

    def begin_clip(self) -> None:
        """From now on it is the next clip's."""
        self._space = ""
        self._at_begin = True

    def add(self, piece: str) -> str:
        """Append what the model wrote, without its timestamps and without U+FFFD, on which orchestrators stall."""
        text = self._space + _TIMESTAMPS.sub("", piece).replace(_REPLACEMENT, "")
        if self._at_begin:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        if not body:
            return ""
        if self._at_begin and self._whole:
            body = self._separator + body
        self._at_begin = False
        self._whole.append(body)
        return body


def timed_segments(
    tokens: Sequence[int], *, first_timestamp: int, eos: int, start: int, end: int, decode: Callable[[list[int]], str]
) -> Iterator[Segment]:
    """The segments of a clip from `start` to `end`, in nanoseconds.

    `tokens` follow the first timestamp, whose id is `first_timestamp`; those above it are the later ones. A segment is
    what stands between two of them; text that no timestamp ends lasts to the end of the clip. No segment ends before it
    begins, or after the clip.
    """
    began, text = start, list[int]()
    for token in tokens:
        if token >= first_timestamp:
            time = min(start + (token - first_timestamp) * STEP, end)
            if text:
                yield Segment(began, max(time, began), _readable(decode(text)), text)
            began, text = time, []
        elif token < eos:
            text.append(token)
    if text:
        yield Segment(began, end, _readable(decode(text)), text)


def diarized_segments(parsed: Sequence[object]) -> list[Segment]:
    """The segments that vLLM's parser for a model with speakers found."""
    return [
        Segment(round(part.start * _SECOND), round(part.end * _SECOND), part.text, speaker=part.speaker)  # type: ignore[attr-defined]
        for part in parsed
    ]


def _readable(text: str) -> str:
    return text.replace(_REPLACEMENT, "")
