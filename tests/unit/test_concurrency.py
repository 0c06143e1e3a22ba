"""Work that a cancellation of its caller does not stop, and work that a failure does."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.concurrency import in_thread, task_group, to_its_end


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


async def test_a_group_fails_with_its_first_failure_and_stops_the_rest() -> None:
    stopped = False

    async def fail() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("bad")

    async def wait() -> None:
        nonlocal stopped
        try:
            await asyncio.sleep(60)
        finally:
            stopped = True

    async def both() -> None:
        async with task_group() as group:
            group.create_task(wait())
            group.create_task(fail())

    with pytest.raises(RuntimeError, match="bad"):
        await both()
    assert stopped


async def test_a_group_gives_results() -> None:
    async with task_group() as group:
        task = group.create_task(asyncio.sleep(0, "done"))
    assert task.result() == "done"


async def test_a_cancelled_group_is_cancelled() -> None:
    async def caller() -> None:
        async with task_group() as group:
            group.create_task(asyncio.sleep(60))

    task = asyncio.create_task(caller())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_request_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all of asyncio's are busy."""
    said: contextvars.ContextVar[str] = contextvars.ContextVar("said")
    said.set("here")
    go_on = threading.Event()
    with ThreadPoolExecutor(2) as few:
        monkeypatch.setattr(asyncio.get_running_loop(), "_default_executor", few)
        held = [asyncio.create_task(asyncio.to_thread(go_on.wait, 10)) for _ in range(3)]
        await asyncio.sleep(0)
        try:
            found = await asyncio.wait_for(in_thread(lambda add: said.get() + add, add=" and there"), 5)
        finally:
            go_on.set()
        assert found == "here and there"
        await asyncio.gather(*held)
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)
