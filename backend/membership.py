"""A node's life at the frontend: registered before it works, kept known, drained and deregistered at its end."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from backend.registration import Frontend, FrontendError

logger = logging.getLogger(__name__)

ATTEMPTS = 10
FIRST_PAUSE = 2.0
LONGEST_PAUSE = 30.0
DRAIN_SECONDS = 30.0
DRAIN_INTERVAL = 1.0
LEAVE_SECONDS = 60.0


class Membership:
    """This node, as the frontend knows it.

    Args:
        frontend: entered already.
        node: the registration; called anew for each.
        facts: of a heartbeat; called in a thread, for it may ask a tool.
        pause: seconds after the first attempt that failed; each further one takes twice as long, up to `LONGEST_PAUSE`.

    """

    def __init__(
        self,
        frontend: Frontend,
        node: Callable[[], Mapping[str, Any]],
        facts: Callable[[], Mapping[str, Any]],
        *,
        pause: float = FIRST_PAUSE,
    ) -> None:
        self._frontend = frontend
        self._node = node
        self._facts = facts
        self._pause = pause
        self._id: str | None = None

    async def join(self) -> None:
        """Register, in up to `ATTEMPTS` attempts.

        Raises:
            FrontendError: the frontend refuses the node, or the last attempt failed.

        """
        pause = self._pause
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._register()
            except FrontendError as error:
                if error.is_final or attempt == ATTEMPTS:
                    raise
                logger.warning("registration failed, next attempt in %g s: %s", pause, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                return

    async def stay(self, interval: float) -> None:
        """Send heartbeats, for ever, the first after `interval` seconds.

        After one that failed the node is registered again: the frontend may have been started anew without what it
        knew, or have taken the node for gone, of which a heartbeat that is answered does not tell.
        """
        healthy = True
        while True:
            await asyncio.sleep(interval)
            try:
                if healthy and self._id is not None:
                    await self._frontend.heartbeat(self._id, await asyncio.to_thread(self._facts))
                else:
                    await self._register()
                healthy = True
            except FrontendError as error:
                if error.status == 404 and healthy:
                    logger.warning("the frontend does not know this node any more: registering again")
                    healthy = await self._register_once()
                    continue
                if healthy:
                    logger.warning("heartbeat failed, will register again: %s", error)
                healthy = False

    async def leave(self) -> None:
        """Drain, wait until nothing is in flight, deregister; never raises, and takes at most `LEAVE_SECONDS`."""
        if self._id is None:
            return
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._drain(self._id)
                await self._frontend.deregister(self._id)
        except (FrontendError, TimeoutError) as error:
            logger.warning("not deregistered: %s", error)
        else:
            logger.info("deregistered")

    async def _register(self) -> None:
        self._id = await self._frontend.register(await asyncio.to_thread(self._node))
        logger.info("registered as node %s", self._id)

    async def _register_once(self) -> bool:
        try:
            await self._register()
        except FrontendError as error:
            logger.warning("registration failed: %s", error)
            return False
        return True

    async def _drain(self, node: str) -> None:
        try:
            await self._frontend.drain(node)
        except FrontendError as error:
            logger.warning("not drained: %s", error)
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            try:
                if await self._frontend.in_flight(node) == 0:
                    return
            except FrontendError as error:
                logger.warning("can't tell what is in flight: %s", error)
            await asyncio.sleep(DRAIN_INTERVAL)
        logger.warning("requests are still in flight after %g s", DRAIN_SECONDS)
