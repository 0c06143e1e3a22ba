"""A further serving process of `--frontends N`: the same port, the same services, the same engine.

It serves requests itself while it has a model attached and the main process lets it; all else it passes on there, where
alone it is known what the server is doing. It does what the main process asks over a socket pair, and ends with it.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import pickle
import signal
import socket
from typing import TYPE_CHECKING, Any, NoReturn, cast

from backend.counters import Counters
from backend.flag_values import SettingsError
from backend.in_flight import InFlight
from backend.lifecycle import UNRELATED, State
from backend.peer import Peer, PeerGone, receive_first
from backend.settings import Settings
from common import orphan_watch
from common.errors import EngineGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from backend.lifecycle import Lifecycle
    from common.frontends import Tokens
    from common.model import Model

logger = logging.getLogger(__name__)

# How soon it is noticed that this process's client of the engine has failed, when no request tells.
_WATCH_INTERVAL = 0.5
# vLLM's client waits so long for the engine to greet it, which is up already.
_READY_SECONDS = "10"


@dataclasses.dataclass(frozen=True)
class Start:
    """What the process is told at its start: `number` counts from 2, `main` is the main process's private socket."""

    settings: Settings
    addr: str
    number: int
    main: str


class Frontend:
    """What a servicer asks here, in a `Lifecycle`'s place, and what the main process has done here.

    Attributes:
        state: of no meaning; whoever asks for health is answered by the main process.

    """

    state = State.NO_MODEL

    def __init__(self, counters: Counters | None) -> None:
        self.warm: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.peer: Peer | None = None
        self._counters = counters
        self._model: Model | None = None
        self._identity = ""
        self._is_open = False
        self._turn = asyncio.Lock()
        self._attaching: asyncio.Task[Any] | None = None
        self._requests = InFlight()

    def on_state(self, listener: "Callable[[State], None]") -> None:
        """Nothing, for there are no states; see `state`."""

    def is_open(self) -> bool:
        """Whether requests are served here."""
        return self._is_open

    def model_for(self, identity: str) -> "Model":
        """As `Lifecycle.model_for`; asked only while `is_open`."""
        return self._requests.model_for(identity, self._model, self._identity)

    async def explained(self, error: Exception) -> Exception:
        """As `Lifecycle.explained`, which is asked."""
        if isinstance(error, UNRELATED) or self.peer is None:
            return error
        error = self._requests.explained(error, self._model)
        model = self._model
        dead = await model.cause_of_death() if model is not None and model.dead else None
        try:
            text = await self.peer.ask("explain", isinstance(error, EngineGone), dead)
        except PeerGone:
            return error
        return error if text is None else EngineGone(text)

    async def watch(self) -> None:
        """Tell the main process when this one's client of the engine has failed."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL)
            if self._is_open and self._model is not None and self._model.dead:
                await self.explained(EngineGone("the engine is gone"))

    # What the main process asks, see `common.frontends.Frontends`.

    async def attach(self, seat: bytes) -> None:
        """Become a client of the engine."""
        self._attaching = asyncio.current_task()
        try:
            async with self._turn:
                module = await asyncio.shield(self.warm)
                self._model = await module.Model.join(seat)
        finally:
            self._attaching = None

    async def open(self, identity: str) -> None:
        """Serve requests here from now on."""
        self._identity = identity
        self._is_open = self._model is not None

    async def idle(self) -> None:
        """Serve none any more, and wait for those in flight."""
        self._is_open = False
        await self._requests.idle()

    async def detach(self) -> None:
        """Serve none any more, end those in flight, leave the engine."""
        self._is_open = False
        if self._attaching is not None:
            self._attaching.cancel()
        async with self._turn:
            model, self._model = self._model, None
            if model is not None:
                await model.close(0)

    async def engine_died(self) -> None:
        """Serve none any more, and end those in flight."""
        self._is_open = False
        if self._attaching is not None:
            self._attaching.cancel()
        if self._model is not None:
            self._model.lose()

    async def tokens(self) -> "Tokens | None":
        """See `Frontends`."""
        return None if self._model is None else self._model.tokens()

    async def snapshot(self) -> bytes:
        """A pickled `backend.merging.Snapshot`."""
        from backend import merging

        scheduled_at = {} if self._model is None else self._model.scheduled_at
        counters = merging.total([] if self._counters is None else [self._counters])  # a copy that stands still
        return await asyncio.to_thread(lambda: pickle.dumps(merging.snapshot(counters, scheduled_at)))


def main(descriptor: int) -> None:
    """Be a frontend, told so over the socket `descriptor`; never returns."""
    # The main process says when; a signal to its group is not for this one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    orphan_watch.begin()
    from backend.logs import configure_logging
    from backend.shutdown import leave

    connection = socket.socket(fileno=descriptor)
    try:
        start: Start = receive_first(connection)
    except (EOFError, OSError):
        leave(1, None)
    with contextlib.suppress(ImportError):
        from setproctitle import setproctitle  # vLLM's

        setproctitle(f"backend: frontend {start.number}")
    configure_logging(start.settings.log_level, start.settings.log_format)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = _READY_SECONDS
    from backend.event_loop import run

    try:
        run(serve(start, connection))
    except SettingsError as error:
        leave(2, f"frontend {start.number}: {error}")


async def serve(start: Start, connection: socket.socket) -> NoReturn:
    """Serve until the main process says so, or is gone; then end the process."""
    from backend import completions
    from backend.forwarding import Forwarding, connect
    from backend.server import SERVICE, build_server, credentials
    from backend.shutdown import leave
    from backend.slow_import import import_in_thread
    from backend.sockets import listen

    completions.install()  # before the channel
    settings = start.settings
    counters = Counters() if settings.metrics_addr else None
    frontend = Frontend(counters)
    channel = connect(start.main)
    # What a lifecycle has beyond this is never asked for: those RPCs are passed on.
    lifecycle = cast("Lifecycle", frontend)
    server = build_server(settings, lifecycle, counters, Forwarding(SERVICE, frontend.is_open, channel))
    listen(server, start.addr, credentials(settings), is_shared=True)

    async def stop(grace: float) -> None:
        await server.stop(grace)
        leave(0, None)

    names = ("attach", "open", "idle", "detach", "engine_died", "tokens", "snapshot")
    peer = frontend.peer = Peer(connection, {name: getattr(frontend, name) for name in names} | {"stop": stop})
    await peer.open()
    await server.start()
    import_in_thread("common.model", frontend.warm, with_spare=False)
    logger.info("frontend %d listens on %s", start.number, start.addr)
    watching = asyncio.create_task(frontend.watch())
    await peer.run()
    watching.cancel()
    # At once, as the kernel is about to: ended in order, the loop would tell the clients that they have cancelled.
    leave(1, None)
