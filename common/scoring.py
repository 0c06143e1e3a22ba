"""Score: log-probabilities of candidate continuations of a prompt."""

from common.engine import Engine
from common.lora import Adapters
from common.pb import backend_pb2 as pb


class Scorer:
    """Scores candidates with the loaded model."""

    def __init__(self, engine: Engine, adapters: Adapters) -> None:
        self._llm = engine.llm
        self._adapters = adapters

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        """The scores of all candidates, in the order of the request."""
        raise NotImplementedError
