"""The other processes that serve the same model on the same port, as a loaded model and a lifecycle see them."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What one process has had of the engine since the model was loaded.

    Attributes:
        prompt: tokens of prompts that are through their prefill.
        completion: tokens made.
        per_second: of the latter, lately.

    """

    prompt: int
    completion: int
    per_second: float


class Frontends(Protocol):
    """All of them together, in the order in which a model comes and goes."""

    @property
    def count(self) -> int:
        """Processes that serve, this one included; 1: there are no others, and nothing below does anything."""

    async def attach(self, seats: Sequence[bytes]) -> None:
        """Make each a client of a running engine; they pass requests on to this process until `open`.

        `seats` are those of `common.joined`, one for each.

        Raises:
            LoadFailed: one could not become a client, or is gone.

        """

    async def open(self, identity: str) -> None:
        """Have them serve requests for the model of that name themselves."""

    async def idle(self) -> None:
        """Have them pass requests on again, and wait until none of their own is in flight."""

    async def detach(self) -> None:
        """Have them end their own requests, as an engine's stop does, and leave the engine. Also from half-attached."""

    async def engine_died(self) -> None:
        """End the requests that they wait for; who asks them hears why from this process."""

    async def tokens(self) -> list[Tokens]:
        """Of each that answers."""

    async def stop(self, grace: float) -> None:
        """End their servers, with `grace` seconds for the last answers, and them; none is left afterwards."""


class Alone:
    """No others."""

    count = 1

    async def attach(self, seats: Sequence[bytes]) -> None:
        """See `Frontends`, as all here."""

    async def open(self, identity: str) -> None:
        """Nothing."""

    async def idle(self) -> None:
        """Nothing."""

    async def detach(self) -> None:
        """Nothing."""

    async def engine_died(self) -> None:
        """Nothing."""

    async def tokens(self) -> list[Tokens]:
        """None."""
        return []

    async def stop(self, grace: float) -> None:
        """Nothing."""


ALONE = Alone()
