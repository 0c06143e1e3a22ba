"""One run: clients that come and go all the time; kills in the first third of it, none in the rest."""

import asyncio
import contextlib
import dataclasses
import os
import random
import time
import traceback
from collections.abc import Awaitable
from pathlib import Path

import psutil

from tests.chaos.clients import KINDS, Call, chosen
from tests.chaos.kills import KILLS, strike
from tests.chaos.parent import Parent
from tests.chaos.record import Record
from tests.chaos.samples import Sampler
from tests.models import ensure

CLIENTS = 10
_ROWS = 600  # as many as a plot has room for, however long the run
_LOOK_SECONDS = 0.5
_THINK_SECONDS = 0.2
# Who finds no server asks no more often than this.
_REFUSED_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run has found.

    Attributes:
        seconds: as asked for; the start of the first server comes on top.

    """

    seed: int
    seconds: float
    kills: int
    servers: int
    record: Record
    sampler: Sampler
    last_words: str
    """Of a server's log what says most."""
    ended: list[str]
    """Tasks of ours that failed, which is a mistake of the harness or an answer of a shape that can't be."""


class Chaos:
    """The run; `play` once."""

    def __init__(self, seed: int, seconds: float, *, kills: bool = True) -> None:
        self._seed = seed
        self._seconds = seconds
        self._with_kills = kills
        self._kinds = chosen(os.environ.get("CHAOS_CLIENTS", ""))
        self._record = Record()
        self._sampler = Sampler(max(1.0, seconds / _ROWS))
        self._parent = Parent(Path(ensure("scripted")), self._record)
        self._soak = not kills
        self._over = False
        self._failures: list[str] = []
        self._kills = 0

    async def play(self) -> Outcome:
        """All of it, for about the seconds asked for."""
        parent = asyncio.create_task(self._parent.run())
        try:
            await self._parent.wait_until_ready()
            others = [asyncio.create_task(self._watched(self._client(number))) for number in range(CLIENTS)]
            others.append(asyncio.create_task(self._watched(self._look())))
            began = time.monotonic()
            if self._with_kills:
                await self._strike_until(began + self._seconds / 3)
            self._soak = True
            await asyncio.sleep(max(began + self._seconds - time.monotonic(), self._seconds / 4))
            self._over = True
            _, hanging = await asyncio.wait(others, timeout=90)
            for task in hanging:
                self._failures.append(f"hangs: {task}")
                task.cancel()
        finally:
            await self._parent.stop()
            await parent
        return Outcome(
            self._seed,
            self._seconds,
            self._kills,
            self._parent.life,
            self._record,
            self._sampler,
            self._parent.last_words,
            self._failures,
        )

    async def _strike_until(self, end: float) -> None:
        generator = random.Random(self._seed)
        order = list(KILLS)
        while True:
            generator.shuffle(order)
            for kill in order:
                # A calm while, long enough to hold good answers to.
                await asyncio.sleep(generator.uniform(1.0, 4.0))
                if time.monotonic() > end:
                    return
                print(f"{self._sampler.now:7.1f} s  {kill.what}", flush=True)
                self._kills += 1
                await strike(kill, self._parent, self._record, generator)

    async def _client(self, number: int) -> None:
        generator = random.Random(f"{self._seed} {number}")
        names, weights = list(self._kinds), [kind.weight for kind in self._kinds.values()]
        while not self._over:
            (name,) = generator.choices(names, weights)
            backend = self._parent.backend
            if backend is None:
                await asyncio.sleep(_REFUSED_SECONDS)
                continue
            call = Call(name, backend.addr, self._record, self._sampler, generator)
            try:
                await KINDS[name].act(call)
            except Exception as error:  # noqa: BLE001  # an answer that can't be read is what we look for
                where = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip()
                self._record.violation(f"{name}: {type(error).__name__} {error}, {where}")
            pause = generator.uniform(0, _THINK_SECONDS)
            await asyncio.sleep(pause if self._parent.ready.is_set() else max(pause, _REFUSED_SECONDS))

    async def _look(self) -> None:
        while not self._over:
            backend = self._parent.backend
            engines: list[psutil.Process] = []
            if backend is not None:
                with contextlib.suppress(psutil.Error):
                    children = await asyncio.to_thread(psutil.Process(backend.pid).children, recursive=True)
                    engines = children
            # A memory that is being loaded says nothing.
            pid = backend.pid if backend is not None and self._parent.ready.is_set() else None
            self._sampler.look(pid, engines, self._parent.life, soak=self._soak)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _watched(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:  # noqa: BLE001  # the run goes on, and fails at its end
            self._failures.append(traceback.format_exc())


def play(seed: int, seconds: float, *, kills: bool = True) -> Outcome:
    """A whole run, in an event loop of its own."""
    return asyncio.run(Chaos(seed, seconds, kills=kills).play())
