"""What TokenizeString and Detokenize refuse before the tokenizer is busy with it."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import InvalidRequest
from common.tokens import MANY_IDS, MOST_IDS, detokenize

VOCABULARY = 10


class Ids(list[int]):
    """Knows the thread that has read it."""

    read_in: threading.Thread | None = None

    def __iter__(self) -> Any:
        self.read_in = threading.current_thread()
        return super().__iter__()


class Renderer:
    """Knows how many ids it was to decode."""

    decoded = 0

    async def _async_tokenizer_decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        if ids == [3]:
            msg = "the tokenizer refuses it"
            raise ValueError(msg)
        return "a" * len(ids)


@pytest.fixture
def llm() -> Any:
    config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY)
    return SimpleNamespace(model_config=config, renderer=Renderer())


async def test_many_ids_are_looked_through_outside_of_the_event_loop(llm: Any) -> None:
    few, many = Ids([1] * MANY_IDS), Ids([1] * (MANY_IDS + 1))
    assert len(await detokenize(llm, few)) == MANY_IDS
    assert len(await detokenize(llm, many)) == MANY_IDS + 1
    assert few.read_in is threading.current_thread()
    assert many.read_in not in (None, threading.current_thread())


async def test_more_ids_than_are_decoded(llm: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^tokens: has {MOST_IDS + 1} ids; use at most {MOST_IDS}$"):
        await detokenize(llm, [1] * (MOST_IDS + 1))
    assert llm.renderer.decoded == 0


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
@pytest.mark.parametrize("before", [1, MANY_IDS])
async def test_an_id_outside_the_vocabulary(llm: Any, wrong: int, before: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"^tokens\[{before}\]: {wrong} is not a token id; use 0 to 9$"):
        await detokenize(llm, [5] * before + [wrong, 99])


async def test_what_the_tokenizer_refuses_is_the_caller_s(llm: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^tokens: the tokenizer refuses it$"):
        await detokenize(llm, [3])


async def test_nothing_to_decode(llm: Any) -> None:
    assert await detokenize(llm, []) == ""
