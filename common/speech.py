"""AudioTranscription: speech -> text, whole or in deltas."""

from collections.abc import AsyncGenerator

from common.engine import Engine
from common.pb import backend_pb2 as pb


class Transcriber:
    """Transcribes audio files with the loaded model."""

    def __init__(self, engine: Engine) -> None:
        self._llm = engine.llm

    async def transcribe(self, request: pb.TranscriptRequest) -> pb.TranscriptResult:
        """The whole transcript."""
        raise NotImplementedError

    async def stream(self, _request: pb.TranscriptRequest) -> AsyncGenerator[pb.TranscriptStreamResponse, None]:
        """The transcript in deltas, then the final result. Closing the iterator drops the requests."""
        raise NotImplementedError
        yield

    def close(self) -> None:
        """Let go of threads and buffers."""
