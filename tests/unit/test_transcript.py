import random

import pytest

from common.transcript import STEP, Segment, Text, diarized_segments, timed_segments

FIRST, EOS = 1000, 900
SECOND = 1_000_000_000


def ts(seconds: float) -> int:
    return FIRST + round(seconds * SECOND / STEP)


def segments(*tokens: int, start: float = 0, end: float = 30) -> list[tuple[float, float, str, list[int]]]:
    """As (start, end, text, tokens), in seconds; a token's text is its number."""
    found = timed_segments(
        tokens,
        first_timestamp=FIRST,
        eos=EOS,
        start=round(start * SECOND),
        end=round(end * SECOND),
        decode=lambda ids: " ".join(map(str, ids)),
    )
    return [(part.start / SECOND, part.end / SECOND, part.text, part.tokens) for part in found]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), []),
        ((EOS,), []),
        ((1, 2, ts(1.5), EOS), [(0, 1.5, "1 2", [1, 2])]),
        ((1, ts(1), ts(1.2), 2, ts(3), EOS), [(0, 1, "1", [1]), (1.2, 3, "2", [2])]),
        ((1, ts(1), 2, ts(2)), [(0, 1, "1", [1]), (1, 2, "2", [2])]),
        ((ts(0.5), 1, ts(1)), [(0.5, 1, "1", [1])]),
        ((1, 2), [(0, 30, "1 2", [1, 2])]),
        ((1, ts(1), ts(1), 2), [(0, 1, "1", [1]), (1, 30, "2", [2])]),
        ((ts(1), ts(2)), []),
        ((1, 901, 950, 2, ts(1)), [(0, 1, "1 2", [1, 2])]),
    ],
    ids=["none", "silence", "one", "pause", "single", "late", "cut", "cut after one", "no text", "control tokens"],
)
def test_segments(tokens: tuple[int, ...], expected: list[tuple[float, float, str, list[int]]]) -> None:
    assert segments(*tokens) == expected


def test_segments_of_a_later_clip() -> None:
    assert segments(1, ts(1), ts(2), 2, ts(29), start=29, end=58) == [(29, 30, "1", [1]), (31, 58, "2", [2])]
    assert segments(1, start=58, end=61.5) == [(58, 61.5, "1", [1])]


def test_segments_stay_in_the_clip_and_in_order() -> None:
    assert segments(1, ts(30), end=2.5) == [(0, 2.5, "1", [1])]
    assert segments(ts(2), 1, ts(1)) == [(2, 2, "1", [1])]
    generator = random.Random(1)
    for _ in range(500):
        tokens = [generator.choice((generator.randrange(EOS), FIRST + generator.randrange(1501))) for _ in range(20)]
        found = segments(*tokens, start=10, end=25)
        assert all(10 <= start <= end <= 25 for start, end, _, _ in found)
        assert [token for *_, part in found for token in part] == [token for token in tokens if token < EOS]


def joined(*clips: list[str], separator: str = " ") -> tuple[list[str], str]:
    text = Text(separator)
    deltas = []
    for clip in clips:
        text.begin_clip()
        deltas += [text.add(piece) for piece in clip]
    return deltas, text.whole


def test_text() -> None:
    assert joined([" The", " kettle", ".<|0.90|>", "<|1.10|>", " Tea? "]) == (
        ["The", " kettle", ".", "", " Tea?"],
        "The kettle. Tea?",
    )
    assert joined([" One. "], [" ", " Two."], ["\n"], [" Three"])[1] == "One. Two. Three"
    assert joined(["一。"], ["二。"], separator="")[1] == "一。二。"
    assert joined([], [" One"])[1] == "One"
    assert joined([" a\N{REPLACEMENT CHARACTER}b"])[1] == "ab"
    assert joined(["one<|0.02|><|0.04|> two<|29.98|>"])[1] == "one two"


def test_deltas_are_the_text() -> None:
    generator = random.Random(2)
    for _ in range(500):
        clips = [
            [generator.choice(["a", " ", " b", "  ", "c ", "", "<|1.00|>"]) for _ in range(generator.randrange(5))]
            for _ in range(generator.randrange(4))
        ]
        deltas, whole = joined(*clips)
        assert "".join(deltas) == whole == whole.strip()


def test_diarized() -> None:
    class Part:
        start, end, text, speaker = 0.5, 1.25, "Hello", "S01"

    assert diarized_segments([Part()]) == [Segment(500_000_000, 1_250_000_000, "Hello", speaker="S01")]
    message = Segment(1, 2, "a", [3], "S01").message(4)
    assert (message.id, message.start, message.end, message.text) == (4, 1, 2, "a")
    assert (list(message.tokens), message.speaker) == ([3], "S01")
