"""What the engine counts of itself: tokens, rates, memory."""

from common.engine import Engine
from common.pb import backend_pb2 as pb


class EngineStatistics:
    """Read from the engine's own statistics."""

    def __init__(self, engine: Engine) -> None:
        self._llm = engine.llm

    def metrics(self) -> pb.MetricsResponse:
        """GetMetrics."""
        raise NotImplementedError

    def memory(self) -> dict[str, int]:
        """Bytes by what vLLM knows them for."""
        return {}
