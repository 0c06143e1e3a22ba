"""The main process's side of `--frontends N`: starts the other N - 1 processes, has them serve, and ends them."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from backend import private_folder
from backend.frontend import Start
from backend.lifecycle import Lifecycle
from backend.peer import Peer, PeerError, PeerGone, send_first
from backend.settings import Settings
from common import orphan_watch
from common.errors import EngineGone, LoadFailed
from common.frontends import Tokens
from common.processes import set_apart

logger = logging.getLogger(__name__)

# What opening and closing may take a frontend; then it counts as hanging.
_ANSWER_SECONDS = 3.0
# The same for leaving an engine: what it held is collected.
_DETACH_SECONDS = 10.0
# The same for becoming a client, for which vLLM may still be on its way in; and for leaving half-way: a model's
# tokenizer and processor are read in one go.
_ATTACH_SECONDS = 120.0
_HALF_WAY_SECONDS = 60.0
# How often each is asked whether it is there, and what an answer may take: importing vLLM stops a process for seconds.
_PULSE_SECONDS = 5.0
_PULSE_ANSWER_SECONDS = 30.0
# What has come while this process itself was stopped is read within this time.
_READ_SECONDS = 0.5
# The same for numbers, which nobody waits longer for.
_NUMBERS_SECONDS = 1.0
# How long a frontend's own trouble with the engine may come before this process notices the engine's death.
_DEATH_SECONDS = 1.0
_DEATH_INTERVAL = 0.05
# What the end takes on top of the last answers.
_LEAVE_SECONDS = 0.5


@dataclasses.dataclass
class _Frontend:
    """One of them, with the last numbers that it gave."""

    number: int
    process: "subprocess.Popen[bytes]"
    peer: Peer
    snapshot: bytes | None = None
    tokens: Tokens | None = None
    killed_for: str | None = None
    is_attaching: bool = False

    def __str__(self) -> str:
        return f"frontend {self.number} (process {self.process.pid})"


class FrontendProcesses:
    """See `common.frontends.Frontends`.

    Attributes:
        count: of all, this process included.
        folder: see `private_folder`.
        socket: where this process listens for what the others pass on.

    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.count = settings.frontends
        self.folder = private_folder.make()
        self.socket = f"{self.folder}/main"
        self._all: list[_Frontend] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False

    async def start(self, addr: str, lifecycle: Lifecycle) -> None:
        """Start them, to listen on `addr`; call in the main thread, with whose end they end.

        A frontend that ends, whatever it does, ends this process by way of `lifecycle`.
        """
        orphan_watch.announce()
        for number in range(2, self.count + 1):
            process, ours = _spawn(Start(self._settings, addr, number, self.socket))

            async def explain(gone: bool, dead: str | None, number: int = number) -> str | None:
                return await _explain(lifecycle, number, gone=gone, dead=dead)

            peer = Peer(ours, {"explain": explain})
            await peer.open()
            frontend = _Frontend(number, process, peer)
            self._all.append(frontend)
            self._keep(self._follow(frontend, lifecycle))
            self._keep(self._feel(frontend))
        logger.info("%d frontends serve %s: processes %s", self.count, addr, ", ".join(map(str, self._pids())))

    async def attach(self, seats: Sequence[bytes]) -> None:
        """See `Frontends`, as all here that says no more."""

        async def attach(frontend: _Frontend, seat: bytes) -> None:
            frontend.is_attaching = True
            try:
                async with asyncio.timeout(_ATTACH_SECONDS):
                    await frontend.peer.ask("attach", seat)
            except TimeoutError:
                why = f"did not become a client of the engine within {_ATTACH_SECONDS:g} s"
                self._kill(frontend, why)
                raise LoadFailed(f"{frontend} {why}") from None
            except PeerError as error:
                raise LoadFailed(f"{frontend} could not become a client of the engine: {error}") from error
            frontend.is_attaching = False

        await asyncio.gather(*(attach(*pair) for pair in zip(self._all, seats, strict=True)))

    async def open(self, identity: str) -> None:
        """A frontend that hangs is killed, which ends this process; also below."""
        await self._ask_all("open", identity)

    async def idle(self) -> None:
        """No time limit but the caller's."""
        await asyncio.gather(*(self._ask(frontend, None, "idle") for frontend in self._all))

    async def detach(self) -> None:
        """See `Frontends`."""

        async def detach(frontend: _Frontend) -> None:
            await self._ask(frontend, _HALF_WAY_SECONDS if frontend.is_attaching else _DETACH_SECONDS, "detach")
            frontend.is_attaching = False
            frontend.tokens = None

        await asyncio.gather(*map(detach, self._all))

    async def engine_died(self) -> None:
        """See `Frontends`."""
        await self._ask_all("engine_died")

    async def tokens(self) -> list[Tokens]:
        """See `Frontends`; of one that is late, what it said last: a sum must not fall for that."""

        async def tokens(frontend: _Frontend) -> None:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(_NUMBERS_SECONDS):
                    frontend.tokens = await frontend.peer.ask("tokens")

        await asyncio.gather(*map(tokens, self._all))
        return [frontend.tokens for frontend in self._all if frontend.tokens is not None]

    async def snapshots(self) -> list[bytes]:
        """What each has counted (`backend.frontend.Frontend.snapshot`); of one that is late, what it said last."""

        async def snapshot(frontend: _Frontend) -> None:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(_NUMBERS_SECONDS):
                    frontend.snapshot = await frontend.peer.ask("snapshot")

        await asyncio.gather(*map(snapshot, self._all))
        return self.last_snapshots()

    def last_snapshots(self) -> list[bytes]:
        """What each said last, of those that ever did."""
        return [frontend.snapshot for frontend in self._all if frontend.snapshot is not None]

    def snapshots_in_thread(self, loop: asyncio.AbstractEventLoop) -> list[bytes]:
        """`snapshots`, for another thread than that of `loop`; the last ones where that is too busy."""
        future = asyncio.run_coroutine_threadsafe(self.snapshots(), loop)
        try:
            return future.result(2 * _NUMBERS_SECONDS)
        except TimeoutError:
            future.cancel()
            return self.last_snapshots()

    async def stop(self, grace: float) -> None:
        """See `Frontends`."""
        self._ending = True

        async def stop(frontend: _Frontend) -> None:
            with contextlib.suppress(PeerError, TimeoutError):
                async with asyncio.timeout(grace + _LEAVE_SECONDS):
                    await frontend.peer.ask("stop", grace)
            frontend.process.kill()
            await asyncio.to_thread(frontend.process.wait)
            frontend.peer.close()

        await asyncio.gather(*map(stop, self._all))

    def _pids(self) -> list[int]:
        return [os.getpid(), *(frontend.process.pid for frontend in self._all)]

    async def _ask_all(self, name: str, *arguments: Any) -> None:
        await asyncio.gather(*(self._ask(frontend, _ANSWER_SECONDS, name, *arguments) for frontend in self._all))

    async def _ask(self, frontend: _Frontend, seconds: float | None, name: str, *arguments: Any) -> None:
        asking = asyncio.ensure_future(frontend.peer.ask(name, *arguments))
        try:
            for patience in (seconds, _READ_SECONDS):
                await asyncio.wait([asking], timeout=patience)
            if asking.done():
                asking.result()
            else:
                self._kill(frontend, f"did not answer within {seconds:g} s ({name})")
        except PeerGone:
            pass  # `_follow` knows what that means
        except PeerError as error:
            self._kill(frontend, f"failed ({name}): {error}")
        finally:
            asking.cancel()

    async def _feel(self, frontend: _Frontend) -> None:
        """Ask it now and then: one that hangs would keep its share of the connections, and of what is admitted."""
        while not self._ending and frontend.process.returncode is None:
            await asyncio.sleep(_PULSE_SECONDS)
            await self._ask(frontend, _PULSE_ANSWER_SECONDS, "tokens")

    async def _follow(self, frontend: _Frontend, lifecycle: Lifecycle) -> None:
        running = asyncio.create_task(frontend.peer.run())
        ended = asyncio.create_task(_end_of(frontend.process.pid))
        await asyncio.wait([running, ended], return_when=asyncio.FIRST_COMPLETED)
        frontend.process.kill()  # one that only closed its end serves no more, either
        running.cancel()
        await ended
        status = await asyncio.to_thread(frontend.process.wait)
        if self._ending:
            return
        how = frontend.killed_for or (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        )
        # vLLM's engine can't take a client back.
        lifecycle.fail(f"{frontend} {how}")

    def _kill(self, frontend: _Frontend, why: str) -> None:
        """End one that would be in the way of the others; `_follow` ends the rest."""
        frontend.killed_for = why
        frontend.process.kill()

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _spawn(start: Start) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """The process, and our end of what leads to it. It leads a process group: signals to ours are not for it."""
    ours, its = socket.socketpair()
    program = f"from backend.frontend import main; main({its.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, process_group=0
    )
    its.close()
    set_apart(f"frontend {start.number}", process.pid)
    send_first(ours, start)
    return process, ours


async def _end_of(pid: int) -> None:
    """Wait for the end of a child that nobody has waited for yet."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def _explain(lifecycle: Lifecycle, number: int, *, gone: bool, dead: str | None) -> str | None:
    """Why a request of a frontend ended, where this process knows better than it; `dead`: its client of the engine is.

    A client that is, while the engine lives on, ends this process.
    """
    error: Exception = EngineGone("the engine is gone") if gone else RuntimeError("a request failed")
    looks = int(_DEATH_SECONDS / _DEATH_INTERVAL) if dead is not None else 1
    for _ in range(looks):
        explanation = await lifecycle.explained(error)
        if explanation is not error:
            return str(explanation)
        if dead is not None:
            await asyncio.sleep(_DEATH_INTERVAL)
    if dead is not None:
        lifecycle.fail(f"frontend {number}: {dead}")
        return str(await lifecycle.explained(error))
    return None
