"""Embedding: one vector for an input, or one per token."""

from common.engine import Engine
from common.pb import backend_pb2 as pb


class Embedder:
    """Embeds inputs with the loaded model."""

    def __init__(self, engine: Engine) -> None:
        self._llm = engine.llm

    async def embed(self, options: pb.PredictOptions) -> pb.EmbeddingResult:
        """The embedding of one input."""
        raise NotImplementedError
