"""Two ends of a socket pair that ask each other things."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from backend.peer import Peer, PeerError, PeerGone, receive_first, send_first


class Pair:
    """Two peers in one loop; `other` answers."""

    def __init__(self) -> None:
        ours, its = socket.socketpair()
        self.held = asyncio.Event()
        self.one = Peer(ours, {"double": self.double})
        self.other = Peer(its, {"double": self.double, "fail": self.fail, "wait": self.held.wait})
        self.tasks: list[asyncio.Task[None]] = []

    async def double(self, number: int) -> int:
        return 2 * number

    async def fail(self) -> None:
        raise ValueError("no such thing")

    async def begin(self) -> None:
        for peer in (self.one, self.other):
            await peer.open()
            self.tasks.append(asyncio.create_task(peer.run()))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    await pair.begin()
    yield pair
    for task in pair.tasks:
        task.cancel()
    for peer in (pair.one, pair.other):
        peer.close()
    await asyncio.gather(*pair.tasks, return_exceptions=True)


async def test_both_ends_ask(pair: Pair) -> None:
    assert list(await asyncio.gather(pair.one.ask("double", 4), pair.other.ask("double", 5))) == [8, 10]


async def test_answers_come_in_any_order(pair: Pair) -> None:
    waiting = asyncio.create_task(pair.one.ask("wait"))
    await asyncio.sleep(0)
    assert await pair.one.ask("double", 1) == 2
    assert not waiting.done()
    pair.held.set()
    assert await waiting


async def test_a_failure_is_told_with_its_text(pair: Pair) -> None:
    with pytest.raises(PeerError, match="ValueError: no such thing") as raised:
        await pair.one.ask("fail")
    assert not isinstance(raised.value, PeerGone)
    with pytest.raises(PeerError, match="KeyError"):
        await pair.one.ask("unheard of")


async def test_who_waits_hears_of_the_others_end_and_who_comes_later_too(pair: Pair) -> None:
    waiting = asyncio.create_task(pair.one.ask("wait"))
    await pair.one.ask("double", 1)
    pair.other.close()
    with pytest.raises(PeerGone):
        await waiting
    with pytest.raises(PeerGone):
        await pair.one.ask("double", 1)
    await asyncio.wait_for(pair.tasks[0], 1)


async def test_large_messages_arrive_whole(pair: Pair) -> None:
    data = bytes(range(256)) * 40_000
    assert await pair.one.ask("double", data) == data + data


def test_the_first_word() -> None:
    ours, its = socket.socketpair()
    with its:
        with ours:
            send_first(ours, {"number": 2})
            assert receive_first(its) == {"number": 2}
        with pytest.raises(EOFError):
            receive_first(its)
