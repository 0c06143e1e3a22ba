"""Which RPCs the loaded model can answer, by vLLM's names of tasks, and the sentence for one that it can't."""

import dataclasses
from typing import Any

from vllm.entrypoints.pooling.utils import enable_scoring_api

from common.errors import Unsupported

_NEEDS = {
    "generate": "a model that generates text, loaded with Embeddings and Reranking unset",
    "embed": "an embedding model, or one that generates text, loaded with Embeddings set",
    "rerank": "a reranker (a cross-encoder with one label, an embedding or a late-interaction model)",
    "token_classify": "a token classifier (an architecture named ...ForTokenClassification)",
    "transcription": "a speech-to-text model such as Whisper",
}
_DOES = {
    "generate": "generates text",
    "transcription": "transcribes speech",
    "embed": "embeds texts",
    "token_embed": "embeds each token of a text",
    "classify": "classifies texts",
    "token_classify": "classifies tokens",
}


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What a loaded model does.

    A model runs under one of vLLM's runners, so it either generates (text, transcripts) or pools, never both.
    """

    generation: frozenset[str]
    """Of "generate", "transcription", "realtime"."""
    pooling: str | None
    """The one pooling task that vLLM runs the model for; None for a model that generates."""
    ranks: bool
    """Whether it can put documents in order."""

    @classmethod
    def of(cls, tasks: tuple[Any, ...], model_config: Any) -> "Abilities":
        """What `AsyncLLM.get_supported_tasks` and the model's configuration come to."""
        generation = frozenset(tasks) & {"generate", "transcription", "realtime"}
        if generation:
            return cls(generation, None, ranks=False)
        ranks = enable_scoring_api(tasks, model_config) and not model_config.skip_tokenizer_init
        return cls(generation, model_config.get_pooling_task(tasks), ranks)

    def can(self, ability: str) -> bool:
        """Whether the model has an ability: a task of vLLM's, or "rerank"; "embed" is one vector or one per token."""
        if ability == "rerank":
            return self.ranks
        if ability == "embed":
            return self.pooling in ("embed", "token_embed")
        return ability in self.generation or ability == self.pooling

    def require(self, rpc: str, ability: str) -> None:
        """Return where the model can answer `rpc`, which takes `ability`.

        Raises:
            Unsupported: with what the loaded model does, and which kind of model could.

        """
        if not self.can(ability):
            raise Unsupported(f"{rpc} needs {_NEEDS[ability]}; the loaded model {self}")

    def __str__(self) -> str:
        """What the model does, as the end of a sentence."""
        does = [_DOES[task] for task in (*sorted(self.generation), self.pooling) if task in _DOES]
        return " and ".join(does) or "does nothing that this server has an RPC for"
