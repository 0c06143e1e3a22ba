"""A further client of an engine that another process of ours has started: what it is handed, and its life."""

import asyncio
import contextlib
import dataclasses
import pickle

from vllm.plugins import load_general_plugins
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from common import tracing
from common.concurrency import to_its_end
from common.engine import Client, Engine
from common.engine_args import LoadPlan
from common.engine_start import new_client, new_throughput
from common.parsers import ParserChoice
from common.processes import give_memory_back
from common.sharing import Place, Shared


@dataclasses.dataclass(frozen=True)
class Seat:
    """All that another process needs to be the client at `place`; `config` is a pickled `VllmConfig`."""

    plan: LoadPlan
    parsers: ParserChoice
    place: Place
    config: bytes


def seats(shared: Shared, plan: LoadPlan, parsers: ParserChoice) -> list[bytes]:
    """A pickled `Seat` for each further client of an engine: who reads one must have imported vLLM."""
    return [pickle.dumps(Seat(plan, parsers, place, shared.config)) for place in shared.places[1:]]


class Joined(Engine):
    """As `Engine`, but that its processes belong to somebody else, who also knows what they died of."""

    _farewell = "left the engine"

    async def cause_of_death(self) -> str:
        """What went wrong in this process, if anything did."""
        return self._handler_failure or "it stopped answering"

    async def stop(self, timeout: float) -> None:
        """End what runs with finish reason "abort", and leave the engine, which goes on."""
        states = self.llm.output_processor
        if not self.errored and (ids := [*states.parent_requests, *states.request_states]):
            with contextlib.suppress(Exception):  # it died meanwhile, and the rest is told so
                await self.llm.abort(ids, internal=True)
        await super().stop(timeout)


async def join(data: bytes) -> tuple[Joined, LoadPlan]:
    """Become the client at a `Seat`; the engine must be up.

    Raises:
        Exception: whatever vLLM's client did not come up for, `LoadFailed` where the engine has died meanwhile.

    """
    seat: Seat = await asyncio.to_thread(pickle.loads, data)
    throughput = new_throughput(seat.plan, shared=True)

    def build() -> Client:
        load_general_plugins()
        config = pickle.loads(seat.config)  # noqa: S301  # from the process that has started us
        config.parallel_config._api_process_rank = seat.place.index
        with tracing.sending_to(seat.plan.traces_endpoint):
            return new_client(seat.plan, config, throughput, seat.place)

    building = asyncio.ensure_future(asyncio.to_thread(build))
    try:
        client = await asyncio.shield(building)
    except asyncio.CancelledError:
        await to_its_end(_let_go(building))
        raise
    engine = Joined(client, seat.parsers, [], None, traced=seat.plan.traces_endpoint is not None)
    try:
        await engine.meet(throughput)
    except BaseException:
        await to_its_end(engine.stop(timeout=0))
        raise
    return engine, seat.plan


async def _let_go(building: asyncio.Future[Client]) -> None:
    """Close the client that nobody waits for any more."""
    with contextlib.suppress(Exception):
        await (await building).shut()
    unregister_vllm_metrics()
    await asyncio.to_thread(give_memory_back)
