"""A loaded model: the front of this package that the serving process talks to.

Importing this module imports vLLM, which takes seconds; the process does so only when its port is open.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from common import engine_start, gguf, joined, reply, tokens
from common.concurrency import in_thread, to_its_end
from common.embedding import Embedder
from common.engine import Engine
from common.engine_args import LoadPlan, plan_load
from common.engine_log import StageClock
from common.errors import ENGINE_STOPPING, EngineGone
from common.frontends import ALONE, Frontends, Tokens
from common.generation import Run
from common.generator import Generator
from common.lora import Adapters
from common.media_prompt import choose_resampler
from common.metadata import model_metadata
from common.observation import Observer
from common.pb import backend_pb2 as pb
from common.processes import give_memory_back
from common.ranking import Ranker
from common.request import GenerationRequest, generation_request, is_heavy
from common.scoring import Scorer
from common.speech import Transcriber
from common.token_classification import TokenClassifier
from common.vllm_log import leave_texts_out

T = TypeVar("T")

__all__ = ["LoadPlan", "Model", "plan_load"]


class Model:
    """One engine with one model in it, from `load` to `close`.

    Attributes:
        plan: how it was loaded.
        traced: whether the trace headers of callers are of use.

    """

    def __init__(self, engine: Engine, plan: LoadPlan, frontends: Frontends = ALONE) -> None:
        leave_texts_out()
        self._frontends = frontends
        self.plan = plan
        self.traced = plan.traces_endpoint is not None
        self._engine = engine
        self._adapters = Adapters(plan.adapters)
        # Clips come to models that embed, and to TokenizeString, too.
        choose_resampler(engine.llm.renderer)
        able = engine.abilities.can
        self._generator = Generator(engine.llm, engine.parsers, self._adapters) if able("generate") else None
        self._scorer = Scorer(engine, self._adapters) if able("generate") else None
        self._embedder = Embedder(engine, self._adapters) if able("embed") else None
        self._ranker = Ranker(engine, self._adapters, plan.score_template) if able("rerank") else None
        self._token_classifier = TokenClassifier(engine, self._adapters) if able("token_classify") else None
        self._transcriber = Transcriber(engine, self._adapters) if able("transcription") else None
        self._statistics = engine.statistics

    @classmethod
    async def load(cls, plan: LoadPlan, clock: StageClock, frontends: Frontends = ALONE) -> "Model":
        """Start an engine, with the parsers asked for or those that the model shows it needs, and attach `frontends`.

        Raises:
            InvalidRequest: an argument that vLLM refuses, or a parser that doesn't exist or doesn't fit.
            LoadFailed: the root cause, where a GGUF file could not be converted, the engine did not come up, or an
                adapter doesn't fit, or a frontend could not be attached.

        """
        async with gguf.in_place(plan.gguf, clock):
            engine = await engine_start.start(plan, clock, frontends)
        try:
            clock.enter("preparing parsers and templates")
            # vLLM imports the model's class where it ranks, and looks for files of it: seconds.
            model = await to_its_end(asyncio.to_thread(cls, engine, plan, frontends))
            await asyncio.to_thread(model.warm_up)
            if plan.adapters.adapters:
                clock.enter("loading LoRA adapters")
                await engine.unless_lost(model._adapters.load(engine.llm))
            if engine.shared is not None:
                clock.enter("attaching the other frontends")
                plan = dataclasses.replace(plan, adapters=model._adapters.as_loaded)
                await engine.unless_lost(frontends.attach(joined.seats(engine.shared, plan, engine.parsers)))
            await asyncio.to_thread(give_memory_back)
        except BaseException:
            await to_its_end(_give_up(engine, frontends))
            raise
        return model

    @classmethod
    async def join(cls, seat: bytes) -> "Model":
        """The model at an engine that another process has started, which has handed over this `seat`.

        Cancelling it takes effect between two steps of a second or so each.

        Raises:
            Exception: whatever vLLM's client or the model's parts did not come up for.

        """
        engine, plan = await joined.join(seat)
        try:
            model = await to_its_end(asyncio.to_thread(cls, engine, plan))
            await asyncio.to_thread(model.warm_up)
            await asyncio.to_thread(give_memory_back)
        except BaseException:
            await to_its_end(engine.stop(timeout=0))
            raise
        return model

    def warm_up(self) -> None:
        """Do what the first request would otherwise wait for. Blocks."""
        if self._generator is not None:
            self._generator.renderer.warmup()
        if self._embedder is not None:
            self._embedder.warm_up()

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

    async def predict(self, options: pb.PredictOptions, observer: Observer | None = None) -> pb.Reply:
        """The whole answer in one reply."""
        generator = self._able("Predict", "generate", self._generator)
        return reply.whole(await Run(generator, await self._understand(options, stream=False), observer).whole())

    async def predict_stream(
        self, options: pb.PredictOptions, observer: Observer | None = None
    ) -> AsyncGenerator[pb.Reply, None]:
        """The answer in chunks, then one with the totals. Closing the iterator drops the request."""
        generator = self._able("PredictStream", "generate", self._generator)
        run = Run(generator, await self._understand(options, stream=True), observer)
        async with contextlib.aclosing(run.deltas()) as deltas:
            async for delta in deltas:
                yield reply.chunk(delta, run.usage)
        yield reply.last_chunk(run.usage, run.logprobs)

    async def tokenize(self, options: pb.PredictOptions) -> pb.TokenizationResponse:
        """The ids of the prompt as generation would see it."""
        prompt = await _read(tokens.prompt_of, options, has_tool_parser=self._has_tool_parser)
        ids = await tokens.tokenize(self._engine.llm, prompt, self._generator)
        return pb.TokenizationResponse(length=len(ids), tokens=ids)

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        """The text of token ids."""
        return pb.DetokenizeResponse(content=await tokens.detokenize(self._engine.llm, request.tokens))

    async def embed(self, options: pb.PredictOptions) -> pb.EmbeddingResult:
        """The embedding of one input."""
        return await self._able("Embedding", "embed", self._embedder).embed(options)

    async def rerank(self, request: pb.RerankRequest) -> pb.RerankResult:
        """The best documents, the most relevant first."""
        return await self._able("Rerank", "rerank", self._ranker).rank(request)

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        """The log-probabilities of candidates, in the order of the request."""
        return await self._able("Score", "generate", self._scorer).score(request)

    async def classify_tokens(self, request: pb.TokenClassifyRequest) -> pb.TokenClassifyResponse:
        """The entities of a text."""
        return await self._able("TokenClassify", "token_classify", self._token_classifier).classify(request)

    async def transcribe(self, request: pb.TranscriptRequest) -> pb.TranscriptResult:
        """The whole transcript of an audio file."""
        return await self._able("AudioTranscription", "transcription", self._transcriber).transcribe(request)

    async def transcribe_stream(
        self, request: pb.TranscriptRequest
    ) -> AsyncGenerator[pb.TranscriptStreamResponse, None]:
        """The transcript in deltas, then the final result. Closing the iterator drops the request."""
        transcriber = self._able("AudioTranscriptionStream", "transcription", self._transcriber)
        async with contextlib.aclosing(transcriber.stream(request)) as responses:
            async for response in responses:
                yield response

    async def metrics(self) -> pb.MetricsResponse:
        """Tokens and rates, as the engine counts them."""
        return self._statistics.metrics(await self._frontends.tokens())

    def tokens(self) -> Tokens | None:
        """What this process's requests have had; None where the engine keeps no statistics."""
        return self._statistics.tokens()

    @property
    def scheduled_at(self) -> dict[int, float]:
        """See `EngineStatistics.scheduled_at`."""
        return self._statistics.scheduled_at

    def lose(self) -> None:
        """End the requests in flight as the engine's death does."""
        self._engine.lose()

    async def metadata(self, options: pb.ModelOptions) -> pb.ModelMetadataResponse:
        """What the model understands and writes besides text."""
        return await model_metadata(self._generator, options)

    def memory(self) -> dict[str, int]:
        """Bytes by what vLLM knows them for, such as weights and KV cache."""
        return self._statistics.memory()

    async def close(self, timeout: float) -> None:
        """Abort what runs, stop the engine, wait for its processes; those left after `timeout` seconds are killed."""
        if self._transcriber is not None:
            self._transcriber.close()
        await self._frontends.detach()
        # They hold vLLM's objects, which are to be collected when the engine stops.
        self._generator = self._scorer = self._embedder = self._ranker = None
        self._token_classifier = self._transcriber = None
        await self._engine.stop(timeout)
        self._adapters.close()

    def _able(self, rpc: str, ability: str, room: T | None) -> T:
        """`room`, where the model has that ability; otherwise the caller hears which kind of model has."""
        if room is None:
            self._engine.abilities.require(rpc, ability)
            raise EngineGone(ENGINE_STOPPING)
        return room

    @property
    def _has_tool_parser(self) -> bool:
        return self._generator is not None and self._generator.has_tool_parser

    async def _understand(self, options: pb.PredictOptions, *, stream: bool) -> GenerationRequest:
        return await _read(
            generation_request,
            options,
            stream=stream,
            has_tool_parser=self._has_tool_parser,
            max_logprobs=0 if self._generator is None else self._generator.max_logprobs,
            ignore_seed=self.plan.ignore_seed,
            ranks=self._engine.ranks,
        )


async def _give_up(engine: Engine, frontends: Frontends) -> None:
    """End a load behind its engine's start. In one piece: a second cancellation must not come between."""
    try:
        await frontends.detach()
    finally:
        await engine.stop(timeout=0)


async def _read(read: Callable[..., T], options: pb.PredictOptions, **how: Any) -> T:
    """`read(options, **how)`, in a thread where that takes long."""
    if is_heavy(options):
        return await in_thread(read, options, **how)
    return read(options, **how)
