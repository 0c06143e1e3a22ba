"""Which CPUs an engine's threads get."""

import os

import pytest

from common import cgroup, cpu_threads
from common.cpu_threads import VARIABLE, bind, choose

EIGHT = tuple(range(8))


def test_vllm_chooses_where_it_can_see_all() -> None:
    assert choose(EIGHT, None, 1, lscpu=True)[0] == "auto"
    assert choose(EIGHT, 8.0, 1, lscpu=True)[0] == "auto"


@pytest.mark.parametrize(
    ("quota", "ranks", "expected"),
    [
        (None, 1, "0,1,2,3,4,5,6"),  # one core for the scheduler, as vLLM leaves it
        (4.0, 1, "0,1,2"),
        (3.7, 1, "0,1"),
        (2.0, 1, "0"),
        (1.0, 1, "0"),
        (0.3, 1, "0"),
        (None, 2, "0,1,2|3,4,5"),
        (None, 3, "0,1|2,3|4"),
        (3.0, 2, "0|1"),
        (2.0, 2, "0|1"),
        (2.0, 3, "nobind"),
    ],
)
def test_chosen_here(quota: float | None, ranks: int, expected: str) -> None:
    value, why = choose(EIGHT, quota, ranks, lscpu=False)
    assert value == expected
    assert "8 cores" in why
    assert (f"a quota of {quota:g}" if quota else "8 cores") in why


def test_a_quota_counts_where_vllm_could_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(EIGHT, 4.0, 1, lscpu=True)[0] == "0,1,2"


def test_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", None)
    monkeypatch.setattr(cgroup, "processors", lambda: 1.0)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(VARIABLE, "before")
    said = bind(1)
    chosen = os.environ[VARIABLE]
    assert chosen in map(str, os.sched_getaffinity(0))
    assert f"{VARIABLE}={chosen}" in said
    assert "a quota of 1" in said


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", "0-1")
    monkeypatch.setenv(VARIABLE, "0-1")
    assert bind(1) == f"{VARIABLE}=0-1, as given"
    assert os.environ[VARIABLE] == "0-1"
