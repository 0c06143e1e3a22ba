"""A loaded model: the front of this package that the serving process talks to.

Importing this module imports vLLM, which takes seconds; the process does so only when its port is open.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator

from common import reply, tokens
from common.concurrency import to_its_end
from common.engine import Engine
from common.engine_args import LoadPlan, plan_load
from common.engine_log import StageClock
from common.generation import Generator, Run
from common.lora import Adapters
from common.observation import NOBODY, Caller
from common.pb import backend_pb2 as pb
from common.processes import give_memory_back
from common.request import GenerationRequest, generation_request, is_heavy
from common.vllm_log import leave_answers_out

__all__ = ["LoadPlan", "Model", "plan_load"]


class Model:
    """One engine with one model in it, from `load` to `close`.

    Attributes:
        plan: how it was loaded.
        traced: whether the trace headers of callers are of use.

    """

    def __init__(self, engine: Engine, plan: LoadPlan) -> None:
        leave_answers_out()
        self.plan = plan
        self.traced = plan.traces_endpoint is not None
        self._engine = engine
        self._adapters = Adapters(plan.adapters)
        self._generator = Generator(engine.llm, engine.parsers, self._adapters)

    @classmethod
    async def load(cls, plan: LoadPlan, clock: StageClock) -> "Model":
        """Start an engine, with the parsers asked for or those that the model shows it needs.

        Raises:
            InvalidRequest: an argument that vLLM refuses, or a parser that doesn't exist or doesn't fit.
            LoadFailed: the root cause, where the engine did not come up or an adapter doesn't fit.

        """
        engine = await Engine.start(plan, clock)
        try:
            clock.enter("preparing parsers and templates")
            model = cls(engine, plan)
            await asyncio.to_thread(model.warm_up)
            if plan.adapters.adapters:
                clock.enter("loading LoRA adapters")
                await model._adapters.load(engine.llm)
            await asyncio.to_thread(give_memory_back)
        except BaseException:
            await to_its_end(engine.stop(timeout=0))
            raise
        return model

    def warm_up(self) -> None:
        """Let the template engine compile what the first chat would otherwise wait for. Blocks."""
        self._generator.renderer.warmup()

    @property
    def dead(self) -> bool:
        """Whether the engine has died; such a model can only be closed."""
        return self._engine.errored

    async def cause_of_death(self) -> str:
        """What the engine died of, in one line; within half a second."""
        return await self._engine.cause_of_death()

    @property
    def running_requests(self) -> int:
        """Requests that the engine has not finished."""
        return int(self._engine.llm.get_num_unfinished_requests())

    async def predict(self, options: pb.PredictOptions, caller: Caller = NOBODY) -> pb.Reply:
        """The whole answer in one reply."""
        return reply.whole(await Run(self._generator, await self._understand(options, stream=False), caller).whole())

    async def predict_stream(
        self, options: pb.PredictOptions, caller: Caller = NOBODY
    ) -> AsyncGenerator[pb.Reply, None]:
        """The answer in chunks, then one with the totals. Closing the iterator drops the request."""
        run = Run(self._generator, await self._understand(options, stream=True), caller)
        async with contextlib.aclosing(run.deltas()) as deltas:
            async for delta in deltas:
                yield reply.chunk(delta, run.usage)
        yield reply.last_chunk(run.usage, run.logprobs)

    async def tokenize(self, options: pb.PredictOptions) -> pb.TokenizationResponse:
        """The ids of the prompt as generation would see it."""
        ids = await tokens.tokenize(self._generator, await self._understand(options, stream=False))
        return pb.TokenizationResponse(length=len(ids), tokens=ids)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """The text of token ids."""
        return pb.DetokenizeResponse(content=await tokens.detokenize(self._generator, request.tokens))

    async def close(self, timeout: float) -> None:
        """Abort what runs, stop the engine, wait for its processes; those left after `timeout` seconds are killed."""
        del self._generator
        await self._engine.stop(timeout)
        self._adapters.close()

    async def _understand(self, options: pb.PredictOptions, *, stream: bool) -> GenerationRequest:
        understand = functools.partial(
            generation_request,
            options,
            stream=stream,
            has_tool_parser=self._generator.has_tool_parser,
            max_logprobs=self._generator.max_logprobs,
            ignore_seed=self.plan.ignore_seed,
        )
        if is_heavy(options):
            return await asyncio.to_thread(understand)
        return understand()
