"""How much an engine takes on: what it runs at a time, and what may wait for that."""

import dataclasses
from typing import Any

# The orchestrator lets 1024 requests through, and all of them may be for one model.
LEAST_WAITING = 1024
# A context of this length for each of them may wait for its prefill.
CONTEXT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the process was told at its start; None: derived from the engine's own limits.

    Attributes:
        running: requests that each data-parallel rank runs at a time; None: vLLM's `max_num_seqs`.
        waiting: requests beyond those that run; None: four for each that can run, at least `LEAST_WAITING`.
        waiting_tokens: prompt tokens of requests that are not through their prefill; None: `LEAST_WAITING` contexts
            of the model's length or `CONTEXT`, whichever is less.

    """

    running: int | None = None
    waiting: int | None = None
    waiting_tokens: int | None = None

    def engine_args(self) -> dict[str, Any]:
        """What the engine is told where the load's own options say nothing."""
        return {} if self.running is None else {"max_num_seqs": self.running}

    def apply(self, config: Any) -> None:
        """Complete a `VllmConfig`; what the load's own options have set there stays."""
        scheduler = config.scheduler_config
        if scheduler.max_num_queued_reqs is None:
            seats = scheduler.max_num_seqs * config.parallel_config.data_parallel_size
            waiting = max(LEAST_WAITING, 4 * seats) if self.waiting is None else self.waiting
            scheduler.max_num_queued_reqs = seats + waiting  # vLLM counts those that run, too
        if scheduler.max_num_queued_tokens is None:
            context = min(config.model_config.max_model_len, CONTEXT)
            tokens = LEAST_WAITING * context if self.waiting_tokens is None else self.waiting_tokens
            scheduler.max_num_queued_tokens = tokens
