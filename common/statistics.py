"""What the engine counts of itself: tokens, rates, memory."""

import asyncio
import collections
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerBase

from common.errors import Unsupported
from common.frontends import Tokens
from common.pb import backend_pb2 as pb
from common.worker_memory import EXTENSION, METHOD

logger = logging.getLogger(__name__)

# How far back "lately" goes, and what less than that is taken for, so that one step makes no rate of its own.
_WINDOW_SECONDS = 10.0
_LEAST_SECONDS = 1.0
_MEMORY_SECONDS = 5.0
_INT32_MAX = 2**31 - 1


class Throughput:
    """Tokens of all requests since the engine started, and how many came lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, shared: bool = False) -> None:
        self._clock = clock
        self._shared = shared
        self.scheduled_at: dict[int, float] = {}
        """When each rank's scheduler was last heard of, where the engine is `shared` with other clients."""
        self._lately: collections.deque[tuple[float, int]] = collections.deque()
        self.prompt_tokens = 0
        """Tokens of prompts that are through their prefill, those out of the prefix cache included."""
        self.completion_tokens = 0

    def add(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what a step of the engine came to."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        if completion_tokens:
            now = self._clock()
            self._forget(now)
            self._lately.append((now, completion_tokens))

    def per_second(self) -> float:
        """Completion tokens a second over the last 10 s, or since the first of them where that is less; 0: idle."""
        now = self._clock()
        self._forget(now)
        if not self._lately:
            return 0.0
        return sum(tokens for _, tokens in self._lately) / max(_LEAST_SECONDS, now - self._lately[0][0])

    def _forget(self, now: float) -> None:
        while self._lately and self._lately[0][0] <= now - _WINDOW_SECONDS:
            self._lately.popleft()

    def logger(self, _vllm_config: Any, _engine_index: int = 0) -> StatLoggerBase:
        """What vLLM reports each step of an engine to; called once for each data-parallel rank."""
        return _SharedStepLogger(self) if self._shared else _StepLogger(self)


class Unscraped(PrometheusStatLogger):  # type: ignore[misc]  # vLLM is untyped to us
    """Stands in for vLLM's Prometheus metrics where there is no port to ask for them: they cost time for each token."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any, **__: Any) -> None:
        """Nothing, like all the others; the signatures are vLLM's."""

    record_sleep_state = record_admission_rejection = log_engine_initialized = record


class EngineStatistics:
    """Of one engine, from its start to its end. `throughput` is None where the engine keeps no statistics."""

    def __init__(self, throughput: Throughput | None) -> None:
        self._throughput = throughput
        self._memory: dict[str, int] = {}

    def metrics(self, others: Sequence[Tokens] = ()) -> pb.MetricsResponse:
        """GetMetrics, with what other processes have had of the same engine.

        Raises:
            Unsupported: the model is loaded without statistics.

        """
        own = self.tokens()
        if own is None:
            raise Unsupported(
                "GetMetrics needs the engine's statistics; load the model with DisableLogStatus (disable_log_stats)"
                " unset"
            )
        all_of_them = [own, *others]
        return pb.MetricsResponse(
            tokens_per_second=sum(tokens.per_second for tokens in all_of_them),
            tokens_generated=min(sum(tokens.completion for tokens in all_of_them), _INT32_MAX),
            prompt_tokens_processed=min(sum(tokens.prompt for tokens in all_of_them), _INT32_MAX),
        )

    def tokens(self) -> Tokens | None:
        """What the requests of this process have had; None where the engine keeps no statistics."""
        throughput = self._throughput
        if throughput is None:
            return None
        return Tokens(throughput.prompt_tokens, throughput.completion_tokens, throughput.per_second())

    @property
    def scheduled_at(self) -> dict[int, float]:
        """`time.monotonic()` when this client last heard of each rank's scheduler, which tells one of its clients."""
        return {} if self._throughput is None else dict(self._throughput.scheduled_at)

    def memory(self) -> dict[str, int]:
        """Bytes by what the workers hold them for; empty where they could not tell."""
        return self._memory

    async def measure_memory(self, llm: AsyncLLM) -> None:
        """Ask the workers, once: neither weights nor KV cache change their size while a model is loaded.

        With data parallelism the first replica answers; workers that a user has extended otherwise can't.
        """
        if llm.vllm_config.parallel_config.worker_extension_cls != EXTENSION:
            return
        try:
            reports = await asyncio.wait_for(llm.collective_rpc(METHOD), _MEMORY_SECONDS)
        except Exception as error:  # noqa: BLE001  # whatever it is: a figure for people is no reason to fail a load
            logger.info("the workers don't tell the memory of weights and KV cache: %s", type(error).__name__)
            return
        self._memory = dict(sum((collections.Counter(report) for report in reports), collections.Counter()))


class _StepLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is untyped to us
    def __init__(self, throughput: Throughput) -> None:
        self._throughput = throughput

    def record(
        self,
        scheduler_stats: Any,  # noqa: ARG002  # vLLM's signature, as are the next two
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Count a step; vLLM calls it in the event loop."""
        if iteration_stats is not None:
            self._throughput.add(iteration_stats.num_prompt_tokens, iteration_stats.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class _SharedStepLogger(_StepLogger):
    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """As `_StepLogger`, and when it was."""
        if scheduler_stats is not None:
            self._throughput.scheduled_at[engine_idx] = time.monotonic()
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)
