"""The only room that creates, watches and shuts down an `AsyncLLM`, and the processes that it starts."""

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from common import links, network, one_process, orphan_watch, spare, topology, tracing
from common.abilities import Abilities
from common.concurrency import to_its_end
from common.engine_args import LoadPlan
from common.engine_config import compile_nothing, configure, say_what_is_used, watch_links
from common.engine_log import EngineLog, StageClock, root_cause
from common.errors import InvalidRequest, LoadFailed
from common.frontends import ALONE, Frontends
from common.parsers import ParserChoice
from common.processes import adopt_orphans, engine_processes, give_memory_back, kill, leave_ray
from common.rank_watch import RankWatch, with_ranks
from common.ranks import Ranks, built
from common.sharing import Admitted, Place, Shared, arguments
from common.statistics import EngineStatistics, Throughput, Unscraped
from common.wording import first_problem

T = TypeVar("T")

logger = logging.getLogger(__name__)

# How often a cancelled load looks for processes that vLLM has started meanwhile.
_KILL_INTERVAL = 0.1
# An engine of one process that is idle has nothing to put in order, and would take itself apart object by object.
_FAREWELL_SECONDS = 1.0
# How long the children of a failed load get to finish writing their last words.
_LAST_WORDS_SECONDS = 5.0
# The same for an engine that died under requests, whose clients wait for the cause; and how often it is looked for.
_AUTOPSY_SECONDS = 0.4
_AUTOPSY_INTERVAL = 0.05
# What the engine wrote before that, it survived.
_LAST_WORDS_AGE = 30.0


class Engine:
    """A running `AsyncLLM` and the processes it consists of.

    Attributes:
        llm: vLLM's own handle; alive until `stop`.
        parsers: what its answers are parsed with, proved against its tokenizer.
        abilities: what the model does; known once the engine runs.
        statistics: what it counts of itself; outlives the engine.
        shared: what other processes need to be its clients, too; None where it has this one only.

    """

    abilities: Abilities
    statistics: EngineStatistics
    _farewell = "engine stopped"

    def __init__(
        self,
        llm: AsyncLLM,
        parsers: ParserChoice,
        processes: list[psutil.Process],
        log: EngineLog | None,
        *,
        traced: bool,
        shared: Shared | None = None,
    ) -> None:
        self.llm = llm
        self.shared = shared
        self._traced = traced
        self.parsers = parsers
        self._processes = processes
        self._log = log
        self._stopping = False
        self._handler_failure: str | None = None
        self._loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._rank_watch: RankWatch | None = None
        stats = llm.admission_stats
        self._admitted: Admitted | None = None if stats is None else stats._counters
        if self._admitted is not None:
            self._admitted.watch(llm)
        logging.getLogger(AsyncLLM.__module__).addFilter(self._notice_handler)

    @property
    def errored(self) -> bool:
        """Whether the engine has died, other than by `stop`; it never recovers."""
        return not self._stopping and bool(self.llm.errored)

    @property
    def ranks(self) -> int:
        """Data-parallel ranks that requests go to."""
        parallel = self.llm.vllm_config.parallel_config
        return int(parallel.data_parallel_size_local if parallel.local_engines_only else parallel.data_parallel_size)

    async def cause_of_death(self) -> str:
        """The last error that the engine's processes wrote, or what else is known."""
        if self._loss.done():
            return self._loss.result()
        deadline = time.monotonic() + _AUTOPSY_SECONDS
        while True:
            if self._handler_failure is not None and all(process.is_running() for process in self._processes):
                return self._handler_failure
            if self._log is not None and (cause := root_cause(self._log.lines(seconds=_LAST_WORDS_AGE))):
                return cause
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_AUTOPSY_INTERVAL)
        gone = [str(process.pid) for process in self._processes if not process.is_running()]
        return f"engine process {', '.join(gone)} was killed" if gone else "it stopped answering"

    def _watch_ranks(self) -> None:
        parallel = self.llm.vllm_config.parallel_config
        if topology.head_address(parallel):
            self._rank_watch = RankWatch(*with_ranks(self.llm, parallel), self._lose)

    def _lose(self, what: str) -> None:
        """End as vLLM does where an engine process says that it dies."""
        if self._stopping or self.llm.errored:
            return
        self._loss.set_result(what)
        self.lose()

    def lose(self) -> None:
        """End the requests in flight: the engine's processes are gone, or as good as."""
        self.llm.engine_core.resources.engine_dead = True
        self.llm.engine_core.outputs_queue.put_nowait(EngineDeadError())

    async def _unless_lost(self, asking: Coroutine[Any, Any, T]) -> T:
        """The answer of all ranks; one that is gone gives none.

        Raises:
            LoadFailed: one is gone, or the engine died.

        """
        task = asyncio.ensure_future(asking)
        ends: list[asyncio.Future[Any]] = [task, self._loss]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            raise LoadFailed(self._loss.result())
        try:
            return task.result()
        except EngineDeadError as error:
            raise LoadFailed(await self.cause_of_death()) from error

    def _notice_handler(self, record: logging.LogRecord) -> bool:
        """Keep why vLLM's output handler ended; out of the log goes what the exception says, and all of an ordered end.

        Its text may hold some of an answer.
        """
        if "output_handler failed" not in record.getMessage():
            return True
        if record.exc_info and (error := record.exc_info[1]) is not None and not isinstance(error, EngineDeadError):
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
            self._handler_failure = f"{type(error).__name__} in the engine's output handler ({where})"
            record.msg, record.args = f"{self._handler_failure}\n{''.join(frames.format())}", ()
            record.exc_info = record.exc_text = None
        return not self._stopping

    @classmethod
    async def start(cls, plan: LoadPlan, clock: StageClock, frontends: Frontends = ALONE) -> "Engine":
        """Build the engine off the event loop, with room for as many clients; takes seconds to minutes.

        Cancelling kills the processes started so far and returns once none is left.

        Raises:
            InvalidRequest: an argument that vLLM refuses, or a parser that doesn't exist or doesn't fit; nothing has
                been started then.
            LoadFailed: with the root cause, out of the children's output where it came from there.

        """
        adopt_orphans()
        orphan_watch.announce()
        loop = asyncio.get_running_loop()
        clock.enter("reading the model's configuration")

        def enter(stage: str) -> None:
            loop.call_soon_threadsafe(clock.enter, stage)

        throughput = None if plan.engine_args.get("disable_log_stats") else Throughput(shared=frontends.count > 1)
        ranks = Ranks()

        def build() -> tuple[AsyncLLM, ParserChoice, Shared | None]:
            config, parsers = configure(plan)
            compile_nothing(config.model_config.enforce_eager)
            if current_platform.is_cpu():
                say_what_is_used(config)
            plan.limits.apply(config)
            head = topology.head_address(config.parallel_config)
            network.use_route_to(head)
            watch_links(is_distributed=bool(head))
            enter("spawning the engine process")
            shared = plan.shared_args(parsers.reasoning_parser)
            with (
                tracing.sending_to(plan.traces_endpoint),
                ranks.awaited(config.parallel_config, shared),
                links.guarded_listeners(links.timeout()) if head else contextlib.nullcontext(),
                one_process.thread_settings(config) if one_process.is_used(config) else contextlib.nullcontext(),
                spare.moving_in(suits=one_process.is_used(config)),
            ):
                llm, sharing = _built(plan, config, throughput, frontends)
            return llm, parsers, sharing

        with EngineLog(enter) as log:
            building = asyncio.ensure_future(asyncio.to_thread(build))
            try:
                llm, parsers, sharing = await built(building, ranks, clock, plan.rank_timeout)
            except (asyncio.CancelledError, LoadFailed):
                await to_its_end(_abandon(building))
                raise
            except InvalidRequest:
                raise
            except Exception as error:
                await asyncio.to_thread(leave_ray)
                await kill(_processes_of_the_load())
                unregister_vllm_metrics()
                lines = await asyncio.to_thread(log.lines, _LAST_WORDS_SECONDS)
                raise LoadFailed(_load_failure(error, lines, ranks)) from error
        engine = cls(llm, parsers, engine_processes(), log, traced=plan.traces_endpoint is not None, shared=sharing)
        try:
            engine._watch_ranks()
            # Starts the task that reads the engine's socket; else a death before the first request goes unnoticed.
            tasks = await engine._unless_lost(llm.get_supported_tasks())
            engine.statistics = EngineStatistics(throughput)
            await engine._unless_lost(engine.statistics.measure_memory(llm))
        except BaseException:
            await to_its_end(engine.stop(timeout=0))
            raise
        # vLLM asks the environment anew for every token; so do its own processes once they are up.
        envs.enable_envs_cache()
        engine.abilities = Abilities.of(tasks, llm.model_config)
        log.forget()
        return engine

    async def stop(self, timeout: float) -> None:
        """Abort what runs, shut the engine down and wait for its processes; those left after `timeout` s are killed.

        In-flight `generate` calls end with finish reason "abort". Never raises for an engine that is already dead.
        """
        started = time.monotonic()
        self._stopping = True
        if self._rank_watch is not None:
            await self._rank_watch.stop()
        if self._loss.done():
            # What is left of it has nobody to talk to any more, and would wait seconds for that.
            await kill(self._processes)
        llm = self.llm
        flushing = asyncio.create_task(tracing.flush()) if self._traced else None
        # Called in the loop, shutdown would cancel the output handler under the consumers and leave them waiting.
        if one_process.is_used(llm.vllm_config) and not llm.get_num_unfinished_requests():
            timeout = min(timeout, _FAREWELL_SECONDS)
        with contextlib.suppress(Exception):
            await asyncio.to_thread(llm.shutdown, timeout)
        # Those that it was killed under: the task that would have told them has been cancelled.
        llm.output_processor.propagate_error(EngineDeadError())
        await asyncio.to_thread(leave_ray)
        await kill(self._processes)
        if flushing is not None:
            with contextlib.suppress(Exception):
                await flushing
        envs.disable_envs_cache()
        # Else a scrape would find the numbers of an engine that is gone.
        unregister_vllm_metrics()
        if self._admitted is not None:
            self._admitted.close()
        del self.llm, llm
        # Collected now: __del__ would shut down once more, at a time of its own choosing.
        await asyncio.to_thread(give_memory_back)
        logging.getLogger(AsyncLLM.__module__).removeFilter(self._notice_handler)
        logger.info("%s in %.1f s", self._farewell, time.monotonic() - started)


def _built(
    plan: LoadPlan, config: VllmConfig, throughput: Throughput | None, frontends: Frontends
) -> tuple[AsyncLLM, Shared | None]:
    """An engine that runs, with its client in this process."""
    if frontends.count == 1:
        return client(plan, config, throughput), None
    shared = Shared.launch(config, frontends, log_stats=throughput is not None)
    try:
        with shared.greeted():
            llm = client(plan, config, throughput, shared.places[0])
    except BaseException:
        shared.forget()
        raise
    shared.adopt(llm)
    return llm, shared


def client(plan: LoadPlan, config: VllmConfig, throughput: Throughput | None, place: Place | None = None) -> AsyncLLM:
    """vLLM's client of the engine that runs at `place`; without one, of an engine that it starts. Blocks."""
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.ENGINE_CONTEXT,
        enable_log_requests=bool(plan.engine_args.get("enable_log_requests")),
        disable_log_stats=throughput is None,
        stat_loggers=_stat_loggers(throughput, is_scraped=plan.scraped),
        **(arguments(place, Admitted(place)) if place is not None else {}),
    )


def _stat_loggers(throughput: Throughput | None, *, is_scraped: bool) -> list[Any] | None:
    """Who hears of each step, beside vLLM's own; None where nobody does."""
    if throughput is None:
        return None
    return [throughput.logger] if is_scraped else [throughput.logger, Unscraped]


async def _abandon(building: "asyncio.Future[tuple[AsyncLLM, ParserChoice, Shared | None]]") -> None:
    """End a load that nobody waits for: vLLM gives up when its processes die, and an engine that came up is shut."""
    while not building.done():
        await kill(_processes_of_the_load())
        await asyncio.wait([building], timeout=_KILL_INTERVAL)
    with contextlib.suppress(Exception):
        llm, _, sharing = building.result()
        await shut(llm)
        del llm
        if sharing is not None:
            sharing.forget()
    unregister_vllm_metrics()
    await asyncio.to_thread(leave_ray)
    await kill(_processes_of_the_load())


async def shut(llm: AsyncLLM) -> None:
    """End a client that nobody has used, and the engine with it where the client has started that."""
    await asyncio.to_thread(llm.shutdown, 0)


def _processes_of_the_load() -> list[psutil.Process]:
    """All but the one that waits for an engine to come."""
    return [process for process in engine_processes() if process.pid != spare.waiting()]


def _load_failure(error: Exception, lines: list[str], ranks: Ranks) -> str:
    """The sentence for LoadModel's caller: the children's last error, else our own exception."""
    if "Engine core initialization failed" in str(error):
        cause = root_cause(lines) or str(error)
    else:
        cause = f"{type(error).__name__}: {first_problem(error)}"
    return f"{cause}; missing was {'; '.join(map(str, ranks.missing))}" if ranks.missing else cause
