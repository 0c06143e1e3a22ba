"""What ended under the process, so that it has to end as well: the cause, and who hears of it."""

import asyncio
import logging
from typing import TYPE_CHECKING

from backend.ending import Ending
from backend.errors import traced
from common.frontends import Frontends

if TYPE_CHECKING:
    from common.model import Model

logger = logging.getLogger(__name__)


class Death:
    """Of the engine, or of a process that serves beside this one; it comes once, and others hear of it once."""

    def __init__(self, ending: Ending, frontends: Frontends) -> None:
        self._ending = ending
        self._frontends = frontends
        self._cause: asyncio.Future[str] | None = None
        self._telling: asyncio.Task[None] | None = None

    async def cause(self) -> str | None:
        """What callers hear, once it is known; None at once where none has come, as of an engine's in a drain."""
        return None if self._cause is None else await asyncio.shield(self._cause)

    def tell_the_others(self) -> None:
        """End the requests of the other serving processes, which can't see an engine's death themselves."""
        if self._telling is None:
            self._telling = asyncio.create_task(self._frontends.engine_died())

    def come_by(self, cause: str) -> None:
        """It is known at once."""
        self._cause = asyncio.get_running_loop().create_future()
        self._cause.set_result(cause)
        self.tell_the_others()

    def come_to(self, model: "Model") -> None:
        """The engine of `model` has died; the process is asked to end as soon as it is known why."""
        self.tell_the_others()
        self._cause = asyncio.create_task(self._report(model))

    async def _report(self, model: "Model") -> str:
        try:
            cause = f"the engine died: {await model.cause_of_death()}"
        except Exception as error:  # noqa: BLE001  # such as no descriptor left to look with; the process ends anyway
            logger.error("the cause of the engine's death is not known: %s", traced(error))  # noqa: TRY400  # no text
            cause = f"the engine died: {type(error).__name__} where the cause was looked for"
        self._ending.ask(cause)
        return cause
