"""Someone who counts what becomes of a request."""

from typing import Protocol


class Observer(Protocol):
    """Told about one request on its way through the engine; called in the event loop, `output` for every output."""

    def submitted(self, prompt_tokens: int) -> None:
        """The request goes to the engine."""

    def output(self, tokens: int) -> None:
        """So many tokens came: of a stream those since the last call, otherwise all."""

    def queued(self, seconds: float) -> None:
        """How long the engine let it wait; told at the end, where the engine keeps statistics."""
