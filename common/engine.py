"""A running engine: the only room that watches and shuts down an `AsyncLLM`; `common.engine_start` creates it."""

import asyncio
import contextlib
import dataclasses
import logging
import time
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from vllm import envs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from common import one_process, private_folders, topology, tracing
from common.abilities import Abilities
from common.engine_log import EngineLog, root_cause
from common.errors import LoadFailed
from common.parsers import ParserChoice
from common.processes import give_memory_back, kill, leave_ray
from common.rank_watch import RankWatch, with_ranks
from common.sharing import Admitted, Shared
from common.statistics import EngineStatistics, Throughput

T = TypeVar("T")

logger = logging.getLogger(__name__)

# An engine of one process that is idle has nothing to put in order, and would take itself apart object by object.
_FAREWELL_SECONDS = 1.0
# How long an engine that died under requests, whose clients wait for the cause, gets to finish writing its last words;
# and how often they are looked for.
_AUTOPSY_SECONDS = 0.4
_AUTOPSY_INTERVAL = 0.05
# How soon a death is noticed by who waits for an answer.
_LOOK_SECONDS = 0.2
# What the engine wrote before that, it survived.
_LAST_WORDS_AGE = 30.0


@dataclasses.dataclass(frozen=True)
class Client:
    """vLLM's client of an engine; `admitted` is what it counts together with others, where it is not the only one."""

    llm: AsyncLLM
    admitted: Admitted | None = None

    async def shut(self) -> None:
        """End it before anyone has used it, and the engine with it where it has started that."""
        try:
            await asyncio.to_thread(self.llm.shutdown, 0)
        finally:
            if self.admitted is not None:
                self.admitted.close()


class Engine:
    """A running `AsyncLLM` and the processes it consists of.

    Attributes:
        llm: vLLM's own handle; alive until `stop`.
        parsers: what its answers are parsed with, proved against its tokenizer.
        abilities: what the model does; known since `meet`.
        statistics: what it counts of itself, since `meet`; outlives the engine.
        shared: what other processes need to be its clients, too; None where it has this one only.

    """

    abilities: Abilities
    statistics: EngineStatistics
    _farewell = "engine stopped"

    def __init__(
        self,
        client: Client,
        parsers: ParserChoice,
        processes: list[psutil.Process],
        log: EngineLog | None,
        *,
        traced: bool,
        shared: Shared | None = None,
        sockets: str | None = None,
    ) -> None:
        self.llm = client.llm
        self.shared = shared
        self._sockets = sockets
        self._traced = traced
        self.parsers = parsers
        self._processes = processes
        self._log = log
        self._stopping = False
        self._handler_failure: str | None = None
        self._loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._rank_watch: RankWatch | None = None
        self._admitted = client.admitted
        if self._admitted is not None:
            self._admitted.watch(self.llm)
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

    def watch_ranks(self) -> None:
        """Notice from here on when ranks of other machines are gone."""
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

    async def meet(self, throughput: Throughput | None) -> None:
        """Hear from the engine for the first time, and what it can do; `throughput` hears of its steps.

        Raises:
            LoadFailed: it died meanwhile, or a rank of it.

        """
        # Starts the task that reads the engine's socket; else a death before the first request goes unnoticed.
        tasks = await self.unless_lost(self.llm.get_supported_tasks())
        self.statistics = EngineStatistics(throughput)
        # vLLM asks the environment anew for every token; so do its own processes once they are up.
        envs.enable_envs_cache()
        self.abilities = Abilities.of(tasks, self.llm.model_config)

    async def measure_memory(self) -> None:
        """Have `statistics` know what the engine's processes take; raises as `meet`."""
        await self.unless_lost(self.statistics.measure_memory(self.llm))

    async def unless_lost(self, asking: Awaitable[T]) -> T:
        """What `asking` comes to. vLLM leaves those without an answer who ask an engine that dies under them.

        Raises:
            LoadFailed: it died, or a rank of another machine is gone; `asking` has been cancelled then.

        """
        task = asyncio.ensure_future(asking)
        ends: list[asyncio.Future[Any]] = [task, self._loss]
        try:
            while not task.done() and not self._loss.done() and not self.errored:
                await asyncio.wait(ends, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if self._loss.done() or self.errored:
                raise LoadFailed(await self.cause_of_death())
            return task.result()
        except EngineDeadError as error:
            raise LoadFailed(await self.cause_of_death()) from error
        finally:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # looked at, so that nothing complains of it

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
        if self._sockets is not None:
            private_folders.remove(self._sockets)
        del self.llm, llm
        # Collected now: __del__ would shut down once more, at a time of its own choosing.
        await asyncio.to_thread(give_memory_back)
        logging.getLogger(AsyncLLM.__module__).removeFilter(self._notice_handler)
        logger.info("%s in %.1f s", self._farewell, time.monotonic() - started)
