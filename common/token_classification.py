"""TokenClassify: the entities of a text, with their UTF-8 byte offsets."""

from common.engine import Engine
from common.pb import backend_pb2 as pb


class TokenClassifier:
    """Finds entities with the loaded model."""

    def __init__(self, engine: Engine) -> None:
        self._llm = engine.llm

    async def classify(self, request: pb.TokenClassifyRequest) -> pb.TokenClassifyResponse:
        """The entities of a text, by where they start."""
        raise NotImplementedError
