"""What is admitted, by the process's limits, the load's, and the engine's."""

from types import SimpleNamespace
from typing import Any

import pytest

from common.admission import Limits
from common.engine_args import plan_load
from common.pb import backend_pb2 as pb


def config(*, seats: int = 256, ranks: int = 1, context: int = 8192, **scheduler: Any) -> Any:
    limits = {"max_num_queued_reqs": None, "max_num_queued_tokens": None} | scheduler
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=seats, **limits),
        parallel_config=SimpleNamespace(data_parallel_size=ranks),
        model_config=SimpleNamespace(max_model_len=context),
    )


@pytest.mark.parametrize(
    ("limits", "engine", "requests", "tokens"),
    [
        (Limits(), {}, 256 + 1024, 1024 * 4096),
        (Limits(), {"seats": 1}, 1025, 1024 * 4096),
        (Limits(), {"seats": 1024}, 5 * 1024, 1024 * 4096),
        (Limits(), {"ranks": 2}, 512 + 2048, 1024 * 4096),
        (Limits(), {"context": 1000}, 1280, 1024 * 1000),
        (Limits(waiting=0), {"seats": 4}, 4, 1024 * 4096),
        (Limits(waiting=3, waiting_tokens=9), {"seats": 4, "ranks": 2}, 11, 9),
        (Limits(waiting=3, waiting_tokens=9), {"max_num_queued_reqs": 7, "max_num_queued_tokens": 0}, 7, 0),
    ],
)
def test_limits(limits: Limits, engine: dict[str, Any], requests: int, tokens: int) -> None:
    made = config(**engine)
    limits.apply(made)
    assert made.scheduler_config.max_num_queued_reqs == requests
    assert made.scheduler_config.max_num_queued_tokens == tokens


@pytest.mark.parametrize(("options", "seats"), [((), 3), (("--max-num-seqs:5",), 5)])
def test_what_a_load_asks_for_beats_the_process(tmp_path: Any, options: tuple[str, ...], seats: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    plan = plan_load(pb.ModelOptions(Model=str(tmp_path), Options=options), Limits(running=3))
    assert plan.engine_args["max_num_seqs"] == seats
    assert plan.limits == Limits(running=3)
