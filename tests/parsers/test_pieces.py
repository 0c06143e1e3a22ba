"""Text between calls stays in its place, however many tokens come in a piece.

Not a case of the matrix, since many parsers leave out such text; but all of them read it alike at every speed.
"""

import asyncio
import random

import pytest

from tests.parsers.cases import BEFORE, PLAIN, TIME, WEATHER, Case, Format
from tests.parsers.feed import Bench
from tests.parsers.formats import FORMATS

TRIES = 12
MOST_TOKENS = 64
BETWEEN = "So the first one is done, and I begin with the second. "
NOTHING_FOLLOWS = {"before v11"}  # Mistral's: a call ends the answer
READ_IN_PIECES = [
    (form, parser)
    for form in FORMATS
    for parser in form.tool
    if form.calls
    and form.parallel
    and form.text_first
    and "harmony" not in form.tokenizer
    and form.note not in NOTHING_FOLLOWS
]


@pytest.mark.parametrize(
    ("form", "parser"), READ_IN_PIECES, ids=[f"{name} {form.note}" for form, name in READ_IN_PIECES]
)
def test_text_between_calls(form: Format, parser: str) -> None:
    assert form.calls
    bench = Bench(form, parser, None)
    one, other = form.calls([WEATHER]), form.calls([TIME])
    length = bench.take_up(Case(raw=BEFORE + one + BETWEEN + other + PLAIN))
    if bench.token_by_token:
        pytest.skip("reads one token at a time")
    expected = asyncio.run(bench.ours_streamed((1,) * length))
    chance = random.Random(parser)
    for _ in range(TRIES):
        splits = [chance.randint(1, MOST_TOKENS) for _ in range(length)]
        assert asyncio.run(bench.ours_streamed(splits)) == expected, splits
