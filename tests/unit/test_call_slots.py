"""What waits for the next call is not ended by who lets go of it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from backend import call_slots
from backend.call_slots import keep_call_slots


class Core:
    """Has one call to give, to the coroutine that grpc.aio waits with."""

    def __init__(self) -> None:
        self.call: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended = False

    async def _request_call(self) -> str:
        try:
            return await self.call
        finally:
            self.ended = True

    async def other(self) -> str:
        return await self._request_call()


@pytest.fixture(autouse=True)
async def _loop() -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    keep_call_slots(loop)
    yield
    loop.set_task_factory(None)


async def test_a_call_comes() -> None:
    core = Core()
    waiting = asyncio.create_task(core._request_call())
    core.call.set_result("it")
    assert await waiting == "it"
    assert not call_slots._waiting


async def test_who_waits_is_cancelled() -> None:
    core = Core()
    waiting = asyncio.create_task(core._request_call())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    del waiting
    await asyncio.sleep(0)
    assert not core.ended
    # In the end the core says that none will come, which nobody hears and nothing logs.
    core.call.set_exception(RuntimeError())
    await asyncio.wait(set(call_slots._waiting))
    assert core.ended


async def test_all_else_is_cancelled_as_ever() -> None:
    core = Core()
    waiting = asyncio.create_task(core.other())
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    assert core.ended
