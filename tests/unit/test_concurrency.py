"""Work that a cancellation of its caller does not stop."""

import asyncio

import pytest

from common.concurrency import to_its_end


async def test_the_result() -> None:
    assert await to_its_end(asyncio.sleep(0, "done")) == "done"


async def test_the_exception() -> None:
    async def fail() -> None:
        raise RuntimeError("bad")

    with pytest.raises(RuntimeError, match="bad"):
        await to_its_end(fail())


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_comes_after_the_work(fails: bool) -> None:
    go_on = asyncio.Event()
    ended = False

    async def work() -> None:
        nonlocal ended
        await go_on.wait()
        ended = True
        if fails:
            raise RuntimeError("nobody asks for this any more")

    caller = asyncio.create_task(to_its_end(work()))
    for _ in range(3):  # as often as anyone likes
        await asyncio.sleep(0)
        caller.cancel()
    await asyncio.sleep(0.01)
    assert not caller.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended
