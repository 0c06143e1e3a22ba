"""The `Backend` service: one short method per RPC, which says only which room does the work."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import grpc

from backend.counters import Counters, Request, Stream
from backend.lifecycle import Lifecycle, State
from common import request_context
from common.errors import BackendError, EngineGone, Unsupported
from common.observation import Observer
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from common.processes import memory_by_process
from common.tracing import trace_headers

if TYPE_CHECKING:
    from common.model import Model

    _Named = pb.PredictOptions | pb.RerankRequest | pb.ScoreRequest | pb.TokenClassifyRequest | pb.TranscriptRequest

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
        return await self._model(request, context).predict(request, self._observer(Request))

    async def PredictStream(self, request: pb.PredictOptions, context: Context) -> None:
        """The answer in chunks. Written to the context, which spares an async generator per token."""
        model = self._model(request, context)
        async with contextlib.aclosing(model.predict_stream(request, self._observer(Stream))) as replies:
            async for reply in replies:
                await context.write(reply)

    async def TokenizeString(self, request: pb.PredictOptions, context: Context) -> pb.TokenizationResponse:
        """Token ids of the prompt."""
        return await self._model(request, context).tokenize(request)

    async def Detokenize(self, request: pb.DetokenizeRequest, _context: Context) -> pb.DetokenizeResponse:
        """Text of token ids."""
        return await self._lifecycle.model_for("").detokenize(request)

    async def Embedding(self, request: pb.PredictOptions, context: Context) -> pb.EmbeddingResult:
        """One vector for an input, or one per token."""
        return await self._model(request, context).embed(request)

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResult:
        """Documents in the order in which they answer a query."""
        return await self._model(request, context).rerank(request)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Log-probabilities of candidate continuations."""
        return await self._model(request, context).score(request)

    async def TokenClassify(self, request: pb.TokenClassifyRequest, context: Context) -> pb.TokenClassifyResponse:
        """The entities of a text."""
        return await self._model(request, context).classify_tokens(request)

    async def AudioTranscription(self, request: pb.TranscriptRequest, context: Context) -> pb.TranscriptResult:
        """The transcript of an audio file."""
        return await self._model(request, context).transcribe(request)

    async def AudioTranscriptionStream(self, request: pb.TranscriptRequest, context: Context) -> None:
        """The same in deltas, then the final result."""
        model = self._model(request, context)
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

    def _model(self, request: "_Named", context: Context) -> "Model":
        """The model that is asked, which may want to know whose trace its work belongs to."""
        model = self._lifecycle.model_for(request.ModelIdentity)
        if model.traced:
            request_context.trace_headers.set(trace_headers(context.invocation_metadata() or ()))
        return model

    def _observer(self, kind: type[Request]) -> Observer | None:
        return kind(self._counters) if self._counters is not None else None
