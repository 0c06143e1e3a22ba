"""How an engine comes to be: the only room that creates an `AsyncLLM`, and that ends the processes of a failed load."""

import asyncio
import contextlib
import dataclasses
from typing import Any

import psutil
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from common import engine_sockets, links, network, one_process, orphan_watch, private_folders, spare, topology, tracing
from common.concurrency import to_its_end
from common.engine import Client, Engine
from common.engine_args import LoadPlan
from common.engine_config import compile_nothing, configure, say_what_is_used, watch_links
from common.engine_log import EngineLog, StageClock, root_cause
from common.errors import InvalidRequest, LoadFailed
from common.frontends import ALONE, Frontends
from common.parsers import ParserChoice
from common.processes import adopt_orphans, engine_processes, kill, leave_ray
from common.ranks import Ranks, built
from common.sharing import Admitted, Place, Shared, arguments
from common.statistics import Throughput, Unscraped
from common.wording import first_problem

# How often a cancelled load looks for processes that vLLM has started meanwhile.
_KILL_INTERVAL = 0.1
# How long the children of a failed load get to finish writing their last words.
_LAST_WORDS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class _Built:
    """What a load has come to, before anyone has heard from it."""

    client: Client
    parsers: ParserChoice
    shared: Shared | None


async def start(plan: LoadPlan, clock: StageClock, frontends: Frontends = ALONE) -> Engine:
    """Build an engine off the event loop, with room for as many clients; takes seconds to minutes.

    Cancelling kills the processes started so far and returns once none is left.

    Raises:
        InvalidRequest: an argument that vLLM refuses, or a parser that doesn't exist or doesn't fit; nothing has
            been started then.
        LoadFailed: with the root cause, out of the children's output where it came from there.

    """
    sockets = engine_sockets.make_folder()
    try:
        return await _start(plan, clock, frontends, sockets)
    except BaseException:
        private_folders.remove(sockets)
        raise


async def _start(plan: LoadPlan, clock: StageClock, frontends: Frontends, sockets: str) -> Engine:
    adopt_orphans()
    orphan_watch.announce()
    loop = asyncio.get_running_loop()
    clock.enter("reading the model's configuration")

    def enter(stage: str) -> None:
        loop.call_soon_threadsafe(clock.enter, stage)

    throughput = new_throughput(plan, shared=frontends.count > 1)
    ranks = Ranks()

    def build() -> _Built:
        config, parsers = configure(plan)
        compile_nothing(config.model_config.enforce_eager)
        if current_platform.is_cpu():
            say_what_is_used(config)
        plan.limits.apply(config)
        head = topology.head_address(config.parallel_config)
        network.use_route_to(head)
        watch_links(is_distributed=bool(head))
        enter("spawning the engine process")
        passed_on = plan.shared_args(parsers.reasoning_parser)
        with (
            tracing.sending_to(plan.traces_endpoint),
            ranks.awaited(config.parallel_config, passed_on),
            links.guarded_listeners(links.timeout()) if head else contextlib.nullcontext(),
            engine_sockets.made_in(None if config.parallel_config.use_ray else sockets),  # other machines have no such
            one_process.thread_settings(config) if one_process.is_used(config) else contextlib.nullcontext(),
            spare.moving_in(suits=one_process.is_used(config)),
        ):
            client, shared = _launched(plan, config, throughput, frontends, sockets)
        return _Built(client, parsers, shared)

    with EngineLog(enter) as log:
        building = asyncio.ensure_future(asyncio.to_thread(build))
        try:
            done = await built(building, ranks, clock, plan.rank_timeout)
        except (asyncio.CancelledError, LoadFailed):
            await to_its_end(_abandon(building))
            raise
        except InvalidRequest:
            raise
        except Exception as error:
            if not building.done():  # it was not the build that failed
                await to_its_end(_abandon(building))
                raise
            await asyncio.to_thread(leave_ray)
            await kill(_processes_of_the_load())
            unregister_vllm_metrics()
            lines = await asyncio.to_thread(log.lines, _LAST_WORDS_SECONDS)
            raise LoadFailed(_load_failure(error, lines, ranks)) from error
    traced = plan.traces_endpoint is not None
    engine = Engine(
        done.client, done.parsers, engine_processes(), log, traced=traced, shared=done.shared, sockets=sockets
    )
    try:
        engine.watch_ranks()
        await engine.meet(throughput)
        await engine.measure_memory()
    except BaseException:
        await to_its_end(engine.stop(timeout=0))
        raise
    log.forget()
    return engine


def _launched(
    plan: LoadPlan, config: VllmConfig, throughput: Throughput | None, frontends: Frontends, sockets: str
) -> tuple[Client, Shared | None]:
    """An engine that runs, with its client in this process; and what the others need to know. Blocks."""
    if frontends.count == 1:
        return new_client(plan, config, throughput), None
    shared = Shared.launch(config, frontends.count, sockets, log_stats=throughput is not None)
    try:
        with shared.greeted():
            client = new_client(plan, config, throughput, shared.places[0])
    except BaseException:
        shared.forget()
        raise
    shared.adopt(client.llm)
    return client, shared


def new_client(plan: LoadPlan, config: VllmConfig, throughput: Throughput | None, place: Place | None = None) -> Client:
    """The client of the engine that runs at `place`; without one, of an engine that it starts. Blocks."""
    admitted: Admitted | None = None
    among_others: dict[str, Any] = {}
    if place is not None:
        admitted = Admitted(place)
        among_others = arguments(place, admitted)
    llm = AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.ENGINE_CONTEXT,
        enable_log_requests=bool(plan.engine_args.get("enable_log_requests")),
        disable_log_stats=throughput is None,
        stat_loggers=_stat_loggers(throughput, is_scraped=plan.scraped),
        **among_others,
    )
    return Client(llm, admitted)


def new_throughput(plan: LoadPlan, *, shared: bool) -> Throughput | None:
    """What hears of each step in this process, one of several where `shared`; None where the plan wants no numbers."""
    return None if plan.engine_args.get("disable_log_stats") else Throughput(shared=shared)


def _stat_loggers(throughput: Throughput | None, *, is_scraped: bool) -> list[Any] | None:
    """Who hears of each step, beside vLLM's own; None where nobody does."""
    if throughput is None:
        return None
    return [throughput.logger] if is_scraped else [throughput.logger, Unscraped]


async def _abandon(building: asyncio.Future[_Built]) -> None:
    """End a load that nobody waits for: vLLM gives up when its processes die, and an engine that came up is shut."""
    while not building.done():
        await kill(_processes_of_the_load())
        await asyncio.wait([building], timeout=_KILL_INTERVAL)
    with contextlib.suppress(Exception):
        await building.result().client.shut()
    unregister_vllm_metrics()
    await asyncio.to_thread(leave_ray)
    await kill(_processes_of_the_load())


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
