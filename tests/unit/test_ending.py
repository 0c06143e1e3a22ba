"""When the process is asked to end, and what it may still wait for then."""

import asyncio

import pytest

from backend.ending import Ending


@pytest.mark.parametrize("cause", [None, "a reason"])
async def test_the_first_cause_stays(cause: str | None) -> None:
    ending = Ending()
    asked = asyncio.create_task(ending.asked())
    await asyncio.sleep(0.01)
    assert not asked.done()
    ending.ask(cause)
    ending.ask("a second one")
    assert await asyncio.wait_for(asked, 5) == cause


async def test_who_waits_no_longer_keeps_nobody_from_asking() -> None:
    ending = Ending()
    asked = asyncio.create_task(ending.asked())
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait([asked])
    ending.ask("a reason")
    assert await asyncio.wait_for(ending.asked(), 5) == "a reason"


async def leaves_time(ending: Ending) -> bool:
    """Whether it waits for work that does not end."""
    work = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(ending.wait(work, 60))
    done, _ = await asyncio.wait([waiting], timeout=0.01)
    assert not work.done(), "it goes on"
    waiting.cancel()
    return not done


async def test_one_who_asks_leaves_time_and_a_second_one_does_not() -> None:
    ending = Ending()
    assert await leaves_time(ending)
    ending.ask()
    assert await leaves_time(ending)
    ending.ask()
    assert not await leaves_time(ending)


async def test_a_hurry_leaves_no_time() -> None:
    ending = Ending()
    ending.ask(hurry=True)
    assert not await leaves_time(ending)


async def test_a_wait_ends_with_the_work_and_with_its_time() -> None:
    ending = Ending()
    work = asyncio.get_running_loop().create_future()
    await asyncio.wait_for(ending.wait(work, 0.01), 5)
    assert not work.done()
    waiting = asyncio.create_task(ending.wait(work, 60))
    await asyncio.sleep(0)
    work.set_result(None)
    await asyncio.wait_for(waiting, 5)
