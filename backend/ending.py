"""Whether the process shall end, for what cause, and how soon; how it ends, in `backend/shutdown.py`."""

import asyncio
from typing import Any


class Ending:
    """What whoever wants the end says, and whoever sees to it hears."""

    def __init__(self) -> None:
        self._asked: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._hurry = asyncio.Event()

    def ask(self, cause: str | None = None, *, hurry: bool = False) -> None:
        """Ask the process to end: with exit status 0, or non-zero when there is a cause.

        Asked once more, or with `hurry`, it ends without waiting for anybody. The first cause stays.
        """
        if hurry or self._asked.done():
            self._hurry.set()
        if not self._asked.done():
            self._asked.set_result(cause)

    async def asked(self) -> str | None:
        """Wait until somebody asks; returns the cause."""
        return await asyncio.shield(self._asked)

    async def wait(self, work: asyncio.Future[Any], seconds: float) -> None:
        """Wait for `work`, at most `seconds`, and no longer than there is no hurry; it goes on."""
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([hurry, work], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
