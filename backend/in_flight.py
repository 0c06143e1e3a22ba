"""The requests that a process is serving itself, and whether they are for the model that it has."""

import asyncio
from typing import Any, TypeVar

from common.errors import ENGINE_STOPPING, BackendError, EngineGone, IdentityMismatch, ModelNotLoaded

M = TypeVar("M")


class InFlight:
    """Requests as tasks.

    Attributes:
        tasks: of those that have not ended, each with its model.

    """

    def __init__(self) -> None:
        self.tasks: dict[asyncio.Task[Any], Any] = {}

    def model_for(self, asked: str, model: M | None, identity: str) -> M:
        """`model`, called `identity`, for a request that names `asked`; empty stands for any.

        The calling task counts as a request in flight until it ends.

        Raises:
            ModelNotLoaded, IdentityMismatch: see there.

        """
        if model is None:
            raise ModelNotLoaded
        if asked and identity and asked != identity:
            raise IdentityMismatch(asked, identity)
        task = asyncio.current_task()
        if task is not None and task not in self.tasks:
            self.tasks[task] = model
            task.add_done_callback(self.tasks.pop)
        return model

    async def idle(self) -> None:
        """Wait until there are none."""
        while self.tasks:
            await asyncio.wait(self.tasks)

    def explained(self, error: Exception, model: object) -> Exception:
        """`error` of the calling task, or that its engine was stopped, where its model is not `model`, the present one.

        What a request ends with then is chance: a step of it may find vLLM's threads ended, or no engine.
        """
        task = asyncio.current_task()
        its = None if task is None else self.tasks.get(task)
        if its is None or its is model or (isinstance(error, BackendError) and not isinstance(error, EngineGone)):
            return error
        return EngineGone(ENGINE_STOPPING)
