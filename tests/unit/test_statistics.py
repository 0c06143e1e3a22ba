from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import StatLoggerManager

from common.errors import Unsupported
from common.statistics import EngineStatistics, Throughput, Unscraped
from common.worker_memory import EXTENSION


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_tokens_add_up_over_steps_and_ranks(clock: Clock) -> None:
    throughput = Throughput(clock)
    first, second = throughput.logger(None, 0), throughput.logger(None, 1)
    first.record(None, SimpleNamespace(num_prompt_tokens=7, num_generation_tokens=1))
    first.record(None, None)  # a step that made nothing
    second.record(None, SimpleNamespace(num_prompt_tokens=0, num_generation_tokens=4), engine_idx=1)
    found = EngineStatistics(throughput).metrics()
    assert (found.prompt_tokens_processed, found.tokens_generated) == (7, 5)
    assert (found.slot_id, found.prompt_json_for_slot) == (0, "")


def test_a_rate_is_of_late(clock: Clock) -> None:
    throughput = Throughput(clock)
    assert throughput.per_second() == 0
    throughput.add(0, 30)
    assert throughput.per_second() == 30  # of a moment, taken for a second
    for _ in range(19):
        clock.now += 0.5
        throughput.add(0, 30)
    assert throughput.per_second() == pytest.approx(20 * 30 / 9.5)
    clock.now += 5.5
    assert throughput.per_second() == pytest.approx(9 * 30 / 9.5, rel=0.1)
    clock.now += 10
    assert throughput.per_second() == 0
    assert throughput.completion_tokens == 600


def test_counts_saturate() -> None:
    throughput = Throughput()
    throughput.add(2**40, 2**31)
    found = EngineStatistics(throughput).metrics()
    assert found.prompt_tokens_processed == found.tokens_generated == 2**31 - 1


def test_without_statistics_it_says_why() -> None:
    with pytest.raises(Unsupported, match="DisableLogStatus"):
        EngineStatistics(None).metrics()


class Workers:
    """An engine whose workers report, or don't."""

    def __init__(self, *reports: dict[str, int], error: Exception | None = None, extension: str = EXTENSION) -> None:
        self._reports, self._error = reports, error
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(worker_extension_cls=extension))

    async def collective_rpc(self, method: str) -> Any:
        assert method == "backend_memory"
        if self._error is not None:
            raise self._error
        return list(self._reports)


async def test_memory_of_all_workers() -> None:
    statistics = EngineStatistics(None)
    assert statistics.memory() == {}
    await statistics.measure_memory(Workers({"weights": 5, "KV cache": 1}, {"weights": 4, "KV cache": 2}))
    assert statistics.memory() == {"weights": 9, "KV cache": 3}


@pytest.mark.parametrize("error", [RuntimeError("no attribute backend_memory"), TimeoutError()])
async def test_workers_that_can_not_tell(error: Exception) -> None:
    statistics = EngineStatistics(None)
    await statistics.measure_memory(Workers(error=error))
    assert statistics.memory() == {}


async def test_workers_that_a_user_has_extended_are_not_asked() -> None:
    statistics = EngineStatistics(None)
    await statistics.measure_memory(Workers({"weights": 5}, extension="theirs.Extension"))
    assert statistics.memory() == {}


def test_vllm_counts_nothing_for_a_port_that_is_not_there() -> None:
    before = {family.name for family in REGISTRY.collect()}
    config: Any = SimpleNamespace()
    manager = StatLoggerManager(config, [0], [Throughput().logger, Unscraped], enable_default_loggers=False)
    manager.log_engine_initialized()
    manager.record(None, SimpleNamespace(num_prompt_tokens=7, num_generation_tokens=1))
    manager.record_sleep_state(1, 1)
    manager.record_admission_rejection("full")
    manager.log()
    assert {family.name for family in REGISTRY.collect()} == before
