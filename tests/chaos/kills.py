"""What is done to the server and to its engine, what calls under it may hear, and how it must end."""

import asyncio
import dataclasses
import random
import signal
import time
from collections.abc import Awaitable, Callable

import grpc
import psutil

from common.pb import backend_pb2 as pb
from tests.chaos.parent import CONTEXTS, Parent
from tests.chaos.record import GONE, LOST, NOTHING, RELOADED, Code, Record
from tests.process.orchestrator import FREE_SECONDS, Backend, name

RECOVERY_SECONDS = 60.0
_LOOK_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Kill:
    """One thing to do.

    Attributes:
        do: does it, and returns when it is done; recovery is watched from then on.
        exits: the exit statuses that a process may end with under it; empty: it must live.
        answers, probes: see `record.Trouble`.

    """

    what: str
    do: Callable[[Parent, Backend, random.Random], Awaitable[None]]
    exits: frozenset[int]
    answers: frozenset[Code]
    probes: frozenset[Code]


def _server(number: signal.Signals) -> Callable[[Parent, Backend, random.Random], Awaitable[None]]:
    async def do(parent: Parent, backend: Backend, _generator: random.Random) -> None:
        await asyncio.to_thread(backend.processes)  # remembers whom to look for
        parent.ready.clear()
        # As the orchestrator: to the group; a crash hits the leader alone.
        (backend.signal_group if number is signal.SIGTERM else backend.signal_leader)(number)

    return do


async def _kill_engine(parent: Parent, backend: Backend, _generator: random.Random) -> None:
    await _kill("EngineCore", parent, backend)


async def _kill_worker(parent: Parent, backend: Backend, _generator: random.Random) -> None:
    parent.ready.clear()
    parent.worker_apart = True
    await parent.load()
    parent.worker_apart = False  # for the next process
    await _kill("Worker", parent, backend)


async def _kill(title: str, parent: Parent, backend: Backend) -> None:
    children = await asyncio.to_thread(backend.children)
    victim = next(child for child in children if title in name(child))
    parent.ready.clear()
    victim.kill()


async def _stop_server(_parent: Parent, backend: Backend, generator: random.Random) -> None:
    await _pause(psutil.Process(backend.pid), generator)


async def _stop_engine(_parent: Parent, backend: Backend, generator: random.Random) -> None:
    (core,) = await asyncio.to_thread(backend.engine_cores)
    await _pause(core, generator)


async def _pause(process: psutil.Process, generator: random.Random) -> None:
    process.suspend()
    try:
        await asyncio.sleep(generator.uniform(1.0, 4.0))
    finally:
        process.resume()


async def _other_options(parent: Parent, _backend: Backend, _generator: random.Random) -> None:
    parent.ready.clear()
    parent.context = next(context for context in CONTEXTS if context != parent.context)
    await parent.load()


async def _free_and_load(parent: Parent, backend: Backend, _generator: random.Random) -> None:
    parent.ready.clear()
    await asyncio.to_thread(backend.call, "Free", pb.HealthMessage(), FREE_SECONDS)
    await parent.load()


async def _kill_in_load(parent: Parent, backend: Backend, generator: random.Random) -> None:
    parent.ready.clear()
    parent.context = next(context for context in CONTEXTS if context != parent.context)
    load = asyncio.create_task(asyncio.to_thread(backend.load, parent.options()))
    await asyncio.wait([load], timeout=generator.uniform(0.0, 8.0))
    await asyncio.to_thread(backend.processes)
    backend.signal_leader(signal.SIGKILL)
    # A fast machine may have been done with it.
    await asyncio.gather(load, return_exceptions=True)


LATE = frozenset({Code.DEADLINE_EXCEEDED})
DEAD = frozenset({-signal.SIGKILL})
KILLS = (
    Kill("engine SIGKILL", _kill_engine, frozenset({1}), GONE, LOST),
    Kill("server SIGKILL", _server(signal.SIGKILL), DEAD, GONE, LOST),
    Kill("server SIGTERM", _server(signal.SIGTERM), frozenset({0}), GONE, LOST),
    Kill("worker SIGKILL", _kill_worker, frozenset({1}), GONE, LOST),
    # A process that is not running answers no probe; all that was asked of it is answered afterwards.
    Kill("server SIGSTOP", _stop_server, frozenset(), NOTHING, LATE),
    Kill("engine SIGSTOP", _stop_engine, frozenset(), NOTHING, NOTHING),
    # The server stays, and answers every probe meanwhile.
    Kill("LoadModel, other options", _other_options, frozenset(), RELOADED, NOTHING),
    Kill("Free, LoadModel", _free_and_load, frozenset(), RELOADED, NOTHING),
    Kill("server SIGKILL in a load", _kill_in_load, DEAD, GONE, LOST),
)


async def strike(kill: Kill, parent: Parent, record: Record, generator: random.Random) -> None:
    """Do it, and wait until a normal client has its answer again."""
    backend = parent.backend
    assert backend is not None
    life = parent.life
    parent.expected_exits = set(kill.exits)
    trouble = record.begin(kill.what, kill.answers, kill.probes)
    try:
        await kill.do(parent, backend, generator)
    except (grpc.RpcError, psutil.Error, StopIteration, ValueError) as error:
        record.violation(f"{kill.what} could not be done: {type(error).__name__} {error}")
    done = time.monotonic()
    while time.monotonic() - done < RECOVERY_SECONDS:
        # An answer of the next process, if there has to be one.
        if (not kill.exits or parent.life > life) and parent.ready.is_set() and record.last_good > done:
            break
        await asyncio.sleep(_LOOK_SECONDS)
    else:
        record.violation(f"{kill.what}: no good answer within {RECOVERY_SECONDS:.0f} s")
    record.end(trouble)
    parent.expected_exits = set()
