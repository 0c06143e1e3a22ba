"""Rerank: documents in the order in which they answer a query."""

from common.engine import Engine
from common.pb import backend_pb2 as pb


class Ranker:
    """Ranks documents with the loaded model."""

    def __init__(self, engine: Engine) -> None:
        self._llm = engine.llm

    async def rank(self, request: pb.RerankRequest) -> pb.RerankResult:
        """The best documents, the most relevant first."""
        raise NotImplementedError
