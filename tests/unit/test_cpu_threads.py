"""Which CPUs an engine's threads get."""

import os

import pytest

from common import cgroup, cpu_threads
from common.cpu_threads import VARIABLE, bind, choose, choose_for_one_process

EIGHT = tuple(range(8))


def test_vllm_chooses_where_nothing_limits_it() -> None:
    assert choose(EIGHT, None, 1) == ("auto", "8 cores")
    assert choose(EIGHT, 8.0, 1) == ("auto", "8 cores")


@pytest.mark.parametrize(
    ("quota", "ranks", "expected"),
    [
        (7.9, 1, "0,1,2,3,4,5"),  # one core for the scheduler, as vLLM leaves it
        (4.0, 1, "0,1,2"),
        (3.7, 1, "0,1"),
        (2.0, 1, "0"),
        (1.0, 1, "0"),
        (0.3, 1, "0"),
        (6.0, 2, "0,1|2,3"),
        (7.0, 3, "0,1|2|3"),
        (3.0, 2, "0|1"),
        (2.0, 2, "0|1"),
        (2.0, 3, "nobind"),
    ],
)
def test_chosen_here(quota: float, ranks: int, expected: str) -> None:
    value, why = choose(EIGHT, quota, ranks)
    assert value == expected
    assert f"8 cores and a quota of {quota:g}" in why


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [
        (1, None, "0"),
        (2, None, "0,1"),
        (7, None, "0,1,2,3,4,5,6"),
        (8, None, "0,1,2,3,4,5,6"),  # one for the server
        (8, 9.0, "0,1,2,3,4,5,6"),
        (8, 7.5, "0,1,2,3,4,5,6"),
        (8, 2.5, "0,1"),
        (8, 0.3, "0"),
    ],
)
def test_chosen_for_one_process(cores: int, quota: float | None, expected: str) -> None:
    value, why = choose_for_one_process(range(cores), quota)
    assert value == expected
    assert why.startswith(f"{cores} core")
    assert ("a quota of" in why) == (quota is not None and quota < cores)


def test_one_process_stays_at_one_memory_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", None)
    monkeypatch.setattr(cgroup, "processors", lambda: None)
    monkeypatch.setattr(cpu_threads, "_cores", lambda _: [(0, 1), (0, 3), (1, 5), (1, 7)])
    monkeypatch.setenv(VARIABLE, "before")
    assert bind(0) == f"{VARIABLE}=1,3, for 2 cores"
    assert os.environ[VARIABLE] == "1,3"
    assert bind(1) == f"{VARIABLE}=auto, for 4 cores"
    # All of this machine's nodes are the first one.
    monkeypatch.setattr(cpu_threads, "_cores", lambda _: [(1, 5), (1, 7)])
    assert bind(0) == f"{VARIABLE}=5,7, for 2 cores"


@pytest.mark.parametrize(
    "name", ["CPU_VISIBLE_MEMORY_NODES", "VLLM_CPU_SIM_MULTI_NUMA", "VLLM_CPU_NUM_OF_RESERVED_CPU"]
)
def test_vllm_chooses_where_the_user_speaks_of_nodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", None)
    monkeypatch.setattr(cgroup, "processors", lambda: None)
    monkeypatch.setenv(VARIABLE, "before")
    monkeypatch.setenv(name, "1")
    assert bind(0).startswith(f"{VARIABLE}=auto")


def test_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", None)
    monkeypatch.setattr(cgroup, "processors", lambda: 0.5)
    monkeypatch.setenv(VARIABLE, "before")
    said = bind(1)
    chosen = os.environ[VARIABLE]
    assert chosen in map(str, os.sched_getaffinity(0))
    assert f"{VARIABLE}={chosen}" in said
    assert "a quota of 0.5" in said


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", "0-1")
    monkeypatch.setenv(VARIABLE, "0-1")
    assert bind(1) == f"{VARIABLE}=0-1, as given"
    assert os.environ[VARIABLE] == "0-1"
