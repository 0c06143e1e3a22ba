"""The states of the process and who may change them: load, free, drain, engine death.

no model --LoadModel--> loading --ok--> ready --Free--> no model
                          |                |
                          `--failed--------+--> no model
any state --SIGTERM--> draining --> exit;   ready --engine died--> failed --> exit

What each RPC answers in each of them stands in docs/reliability.md; who ends the process, in `backend/ending.py`.
"""

import asyncio
import enum
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backend.death import Death
from backend.ending import Ending
from backend.in_flight import InFlight
from backend.slow_import import import_in_thread
from common.admission import Limits
from common.concurrency import to_its_end
from common.engine_log import StageClock
from common.errors import (
    EngineGone,
    IdentityMismatch,
    InvalidRequest,
    LoadCancelled,
    LoadFailed,
    ModelNotLoaded,
    Unsupported,
)
from common.frontends import ALONE, Frontends
from common.pb import backend_pb2 as pb

if TYPE_CHECKING:
    from common.model import Model

logger = logging.getLogger(__name__)

# Within the 5 s that the orchestrator waits for Free: what has not ended by then is killed.
_FREE_TIMEOUT = 3.0
# How soon the death of an engine is noticed when no request tells.
_WATCH_INTERVAL = 0.5

SHUTTING_DOWN = "the server is shutting down"
# What is the caller's own, whatever becomes of the engine.
UNRELATED = (Unsupported, ModelNotLoaded, IdentityMismatch)


class State(enum.Enum):
    """What the process is doing."""

    NO_MODEL = "no model"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Lifecycle:
    """The one model of the process; with an engine that dies, it asks for the end of the process.

    Attributes:
        load_clock: the stage of the load that is running; None otherwise.
        loaded_at: `time.monotonic()` of the moment that the model was ready; None without one.

    """

    def __init__(
        self,
        ending: Ending,
        *,
        shutdown_timeout: float,
        limits: Limits = Limits(),  # noqa: B008  # it is frozen
        scraped: bool = False,
        frontends: Frontends = ALONE,
    ) -> None:
        self._ending = ending
        self._state = State.NO_MODEL
        self._state_listeners: list[Callable[[State], None]] = []
        self.load_clock: StageClock | None = None
        self.loaded_at: float | None = None
        self._shutdown_timeout = shutdown_timeout
        self._limits = limits
        self._scraped = scraped
        self._frontends = frontends
        self._model: Model | None = None
        self._identity = ""
        self._death = Death(ending, frontends)
        self._turn = asyncio.Lock()
        self._loads: set[asyncio.Task[None]] = set()
        self._requests = InFlight()
        self._warm: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    @property
    def state(self) -> State:
        """What the process is doing."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        changed, self._state = state is not self._state, state
        for listener in self._state_listeners if changed else ():
            listener(state)

    def on_state(self, listener: Callable[[State], None]) -> None:
        """Call `listener` at every change of the state, in the event loop and before anything follows from it."""
        self._state_listeners.append(listener)

    @property
    def scheduled_at(self) -> dict[int, float]:
        """See `Model.scheduled_at`; empty without one."""
        return {} if self._model is None else self._model.scheduled_at

    @property
    def has_model(self) -> bool:
        """Whether there is an engine that needs a shutdown."""
        return self._model is not None

    def engine_memory(self) -> dict[str, int]:
        """Bytes by what the engine holds them for; empty without one."""
        return {} if self._model is None else self._model.memory()

    def model_for(self, identity: str) -> "Model":
        """The loaded model, for a request that names `identity` (empty: any).

        The calling task counts as a request in flight until it ends; see `idle`.

        Raises:
            EngineGone: the process is shutting down, or its engine died.
            ModelNotLoaded, IdentityMismatch: see there.

        """
        self._refuse_at_the_end()
        return self._requests.model_for(identity, self._model, self._identity)

    async def explained(self, error: Exception) -> Exception:
        """`error` as the caller of an RPC should hear of it: with the cause where the engine ended under it."""
        if isinstance(error, UNRELATED):
            return error
        error = self._requests.explained(error, self._model)
        if self.state is State.DRAINING and isinstance(error, EngineGone):
            return EngineGone(SHUTTING_DOWN)
        self._notice_death()
        cause = await self._death.cause()
        return error if cause is None else EngineGone(cause)

    async def check_health(self) -> None:
        """Return at once where the process is sound, with or without a model.

        Raises:
            EngineGone: the engine died; the process is about to end.

        """
        if self.state is State.FAILED:
            raise await self.explained(EngineGone("the engine died"))

    def import_in_background(self) -> None:
        """Import vLLM in a thread, so that LoadModel finds it warm. The thread never holds up the process's exit."""
        import_in_thread("common.model", self._warm)

    async def load(self, options: pb.ModelOptions) -> None:
        """Load the model that `options` ask for. One that is loaded the same way stays; another one goes first.

        Waits its turn while another load runs. Cancelling cancels the load.

        Raises:
            InvalidRequest, Unsupported, LoadFailed: with a text for LoadModel's caller.
            EngineGone: the process is about to end.

        """
        self._refuse_at_the_end()
        task = asyncio.create_task(self._load_in_turn(options))
        self._loads.add(task)
        try:
            await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                logger.info("load cancelled: its caller went away")
                raise
            raise LoadCancelled("the load was cancelled: Free or a shutdown came first") from None
        finally:
            self._loads.discard(task)

    async def free(self) -> None:
        """Unload: cancel loads that run or wait, abort requests, stop the engine. Nothing to do without a model."""
        self._cancel_loads()
        async with self._turn:
            await self._close_model()

    def fail(self, cause: str) -> None:
        """End the process for `cause`, though its engine may live: with it, at once; requests in flight hear why."""
        if self.state not in (State.FAILED, State.DRAINING):
            self.state = State.FAILED
            self._death.come_by(cause)
        self._ending.ask(cause, hurry=True)

    async def watch(self) -> None:
        """Ask for the end when the engine dies, which never comes back: only then the orchestrator starts another."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL)
            self._notice_death()

    def drain(self) -> None:
        """Take no more requests, and give up a load that is running; `idle`, then `free` end the rest."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        self._cancel_loads()

    async def idle(self) -> None:
        """Wait until no request is in flight, here or in the other serving processes."""
        watching = asyncio.create_task(self._watch_for_the_others())
        try:
            await asyncio.gather(self._requests.idle(), self._frontends.idle())
        finally:
            watching.cancel()

    async def _watch_for_the_others(self) -> None:
        """An engine's death in a drain is no cause any more, but the others wait for it."""
        while self._model is not None:
            if self._model.dead:
                self._death.tell_the_others()
                return
            await asyncio.sleep(_WATCH_INTERVAL)

    async def _load_in_turn(self, options: pb.ModelOptions) -> None:
        async with self._turn:
            self._refuse_at_the_end()
            try:
                await self._load(options)
                self._identity = options.Model
            finally:
                self.load_clock = None
                if self.state is State.LOADING:
                    self.state = State.READY if self._model else State.NO_MODEL
            if self.state is State.READY:
                # So far they have passed on to this process what was for the model.
                await to_its_end(self._frontends.open(self._identity))

    async def _load(self, options: pb.ModelOptions) -> None:
        if self._model is None:
            self.state = State.LOADING
        clock = self.load_clock = StageClock(lambda stage, seconds: logger.info("load: %s took %.1f s", stage, seconds))
        if not self._warm.done():
            clock.enter("importing vLLM")
        module = await asyncio.shield(self._warm)
        plan = await asyncio.to_thread(module.plan_load, options, self._limits, scraped=self._scraped)
        if self._model is not None and self._model.plan == plan and not self._model.dead:
            logger.info("load: %s is loaded with the same options", plan.model)
            return
        self._refuse_at_the_end()  # which may have come meanwhile
        self.state = State.LOADING
        await self._close_model()
        self._refuse_at_the_end()
        logger.info("load: %s with %s", plan.model, {k: v for k, v in plan.engine_args.items() if k != "hf_token"})
        try:
            self._model = await module.Model.load(plan, clock, self._frontends)
        except (InvalidRequest, LoadFailed) as error:
            logger.warning("load failed after %.1f s: %s", clock.seconds, error)
            raise
        clock.enter(None)
        self.loaded_at = time.monotonic()
        logger.info("load: ready in %.1f s", clock.seconds)

    async def _close_model(self) -> None:
        model, self._model, self._identity = self._model, None, ""
        self.loaded_at = None
        if self.state is State.READY:
            self.state = State.NO_MODEL
        if model is not None:
            # Half an engine under the next one would be worse than a late answer.
            ending = self.state in (State.DRAINING, State.FAILED)
            await to_its_end(model.close(self._shutdown_timeout if ending else _FREE_TIMEOUT))

    def _refuse_at_the_end(self) -> None:
        if self.state is State.DRAINING:
            raise EngineGone(SHUTTING_DOWN)
        if self.state is State.FAILED:
            raise EngineGone("the engine died")

    def _cancel_loads(self) -> None:
        for task in self._loads:
            task.cancel()

    def _notice_death(self) -> None:
        model = self._model
        if model is None or self.state is not State.READY or not model.dead:
            return
        self.state = State.FAILED
        self._death.come_to(model)
