"""The requests that a process is serving itself, and whether they are for the model that it has."""

import asyncio
from typing import Any, TypeVar

from common.errors import IdentityMismatch, ModelNotLoaded

M = TypeVar("M")


class InFlight:
    """Requests as tasks.

    Attributes:
        tasks: of those that have not ended.

    """

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

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
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return model
