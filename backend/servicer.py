"""The `Backend` service: one short method per RPC, which says only which room does the work."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc

from backend.counters import Counters, Request, Stream
from backend.lifecycle import Lifecycle, State
from common.errors import BackendError, EngineGone, Unsupported
from common.observation import NOBODY, Caller
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from common.processes import memory_by_process
from common.tracing import trace_headers

if TYPE_CHECKING:
    from common.model import Model

Context = grpc.aio.ServicerContext[Any, Any]

_OK = pb.Reply(message=b"OK")
_STATES = {
    State.NO_MODEL: pb.StatusResponse.UNINITIALIZED,
    State.LOADING: pb.StatusResponse.BUSY,
    State.READY: pb.StatusResponse.READY,
    State.DRAINING: pb.StatusResponse.BUSY,
    State.FAILED: pb.StatusResponse.ERROR,
}


class BackendServicer(pb_grpc.BackendServicer):
    """Every RPC as a coroutine; exceptions get their status in `interceptors.StatusMapping`."""

    def __init__(self, lifecycle: Lifecycle, counters: Counters | None = None) -> None:
        self._lifecycle = lifecycle
        self._counters = counters

    async def Health(self, _request: pb.HealthMessage, _context: Context) -> pb.Reply:
        """OK at every moment, but for the last ones of a process whose engine died."""
        await self._lifecycle.check_health()
        return _OK

    async def LoadModel(self, request: pb.ModelOptions, _context: Context) -> pb.Result:
        """Load a model; the only RPC that answers a failure as a result, but for the end of the process."""
        try:
            await self._lifecycle.load(request)
        except EngineGone:
            raise
        except BackendError as error:
            return pb.Result(success=False, message=str(error).encode(errors="replace").decode())
        return pb.Result(success=True, message="model loaded")

    async def Free(self, _request: pb.HealthMessage, _context: Context) -> pb.Result:
        """Unload; the process stays."""
        await self._lifecycle.free()
        return pb.Result(success=True, message="model freed")

    async def Predict(self, request: pb.PredictOptions, context: Context) -> pb.Reply:
        """The whole answer."""
        model = self._lifecycle.model_for(request.ModelIdentity)
        return await model.predict(request, self._caller(model, context, Request))

    async def PredictStream(self, request: pb.PredictOptions, context: Context) -> None:
        """The answer in chunks. Written to the context, which spares an async generator per token."""
        model = self._lifecycle.model_for(request.ModelIdentity)
        async with contextlib.aclosing(model.predict_stream(request, self._caller(model, context, Stream))) as replies:
            async for reply in replies:
                await context.write(reply)

    async def TokenizeString(self, request: pb.PredictOptions, _context: Context) -> pb.TokenizationResponse:
        """Token ids of the prompt."""
        return await self._lifecycle.model_for(request.ModelIdentity).tokenize(request)

    async def Detokenize(self, request: pb.DetokenizeRequest, _context: Context) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await self._lifecycle.model_for("").detokenize(request)

    async def Embedding(self, request: pb.PredictOptions, _context: Context) -> pb.EmbeddingResult:
        """One vector for an input, or one per token."""
        return await self._lifecycle.model_for(request.ModelIdentity).embed(request)

    async def Rerank(self, request: pb.RerankRequest, _context: Context) -> pb.RerankResult:
        """Documents in the order in which they answer a query."""
        return await self._lifecycle.model_for(request.ModelIdentity).rerank(request)

    async def Score(self, request: pb.ScoreRequest, _context: Context) -> pb.ScoreResponse:
        """Log-probabilities of candidate continuations."""
        return await self._lifecycle.model_for(request.ModelIdentity).score(request)

    async def TokenClassify(self, request: pb.TokenClassifyRequest, _context: Context) -> pb.TokenClassifyResponse:
        """The entities of a text."""
        return await self._lifecycle.model_for(request.ModelIdentity).classify_tokens(request)

    async def AudioTranscription(self, request: pb.TranscriptRequest, _context: Context) -> pb.TranscriptResult:
        """The transcript of an audio file."""
        return await self._lifecycle.model_for(request.ModelIdentity).transcribe(request)

    async def AudioTranscriptionStream(self, request: pb.TranscriptRequest, context: Context) -> None:
        """The same in deltas, then the final result."""
        model = self._lifecycle.model_for(request.ModelIdentity)
        async with contextlib.aclosing(model.transcribe_stream(request)) as responses:
            async for response in responses:
                await context.write(response)

    async def AudioTranscriptionLive(self, _requests: Any, _context: Context) -> None:
        """No model that vLLM serves here takes live audio through this wire."""
        raise Unsupported("AudioTranscriptionLive needs a speech model that takes live audio; use AudioTranscription")

    async def GetMetrics(self, _request: pb.MetricsRequest, _context: Context) -> pb.MetricsResponse:
        """Tokens and rates, as the engine counts them."""
        return await self._lifecycle.model_for("").metrics()

    async def ModelMetadata(self, request: pb.ModelOptions, _context: Context) -> pb.ModelMetadataResponse:
        """What the loaded model understands and writes besides text."""
        return await self._lifecycle.model_for("").metadata(request)

    async def Status(self, _request: pb.HealthMessage, _context: Context) -> pb.StatusResponse:
        """State, and resident bytes by process, in all and with what the engine holds of them.

        While a load runs, also its stage with the seconds since its begin, and the ranks that it waits for.
        """
        breakdown = await asyncio.to_thread(memory_by_process)
        memory = pb.MemoryUsageData(total=sum(breakdown.values()), breakdown=breakdown)
        memory.breakdown.update(self._lifecycle.engine_memory())
        clock = self._lifecycle.load_clock
        if clock is not None and clock.stage is not None:
            memory.breakdown[f"loading, {clock.stage} (seconds)"] = int(clock.seconds)
            memory.breakdown.update({f"waiting (seconds) for {ranks}": int(clock.seconds) for ranks in clock.waiting})
        return pb.StatusResponse(state=_STATES[self._lifecycle.state], memory=memory)

    def _caller(self, model: "Model", context: Context, observer: type[Request]) -> Caller:
        if self._counters is None and not model.traced:
            return NOBODY
        headers = trace_headers(context.invocation_metadata() or ()) if model.traced else None
        return Caller(headers, observer(self._counters) if self._counters is not None else None)
