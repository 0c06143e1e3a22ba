"""What the spare process is started with, and which engines it can become."""

import os
from pathlib import Path

import pytest
import torch
from vllm.config import VllmConfig

from common import cpu_threads, one_process, spare

GOMP = min((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, and a user who has said nothing."""
    monkeypatch.setattr(cpu_threads, "_GIVEN", None)
    monkeypatch.setattr(cpu_threads, "_cores", lambda _: [(0, 0), (0, 1)])
    for name in ("LD_PRELOAD", "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "TORCHDYNAMO_DISABLE", cpu_threads.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(cpu_threads.VARIABLE, "")


def added() -> dict[str, str] | None:
    """What is expected beside what is there."""
    expected = spare._expected()
    return None if expected is None else dict(expected.items() - os.environ.items())


def test_with_the_defaults() -> None:
    assert added() == {
        "LD_PRELOAD": str(GOMP),
        "OMP_NUM_THREADS": "2",
        "GOMP_CPU_AFFINITY": "0 1",
        "TORCHDYNAMO_DISABLE": "1",
    }


def test_beside_what_the_user_preloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert (added() or {})["LD_PRELOAD"] == f"libtcmalloc.so:{GOMP}"
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so:libgomp.so.1")
    assert "LD_PRELOAD" not in (added() or {})


def test_threads_that_are_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", "nobind")
    monkeypatch.setenv(cpu_threads.VARIABLE, "nobind")
    assert (added() or {}).keys() == {"LD_PRELOAD", "TORCHDYNAMO_DISABLE"}


@pytest.mark.parametrize("given", ["0-1", "auto", "0|1"])
def test_threads_that_vllm_binds(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_GIVEN", given)
    monkeypatch.setenv(cpu_threads.VARIABLE, given)
    assert added() is None


@pytest.mark.parametrize("library", ["libiomp5.so", "libomp.so"])
def test_another_openmp(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", library)
    assert added() == {
        "OMP_NUM_THREADS": "2",
        "KMP_AFFINITY": "granularity=fine,explicit,proclist=[0,1]",
        "KMP_BLOCKTIME": "5",
        "KMP_TPAUSE": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }


@pytest.mark.parametrize("preloaded", ["", "libgomp.so.1", "libiomp5.so"])
def test_as_vllm_binds_threads(preloaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if preloaded:
        monkeypatch.setenv("LD_PRELOAD", preloaded)
    expected = spare._expected()
    assert expected
    for name in ("LD_PRELOAD", cpu_threads.VARIABLE):
        monkeypatch.setenv(name, expected[name])
    with one_process.thread_settings(VllmConfig()):
        assert {name: value for name, value in os.environ.items() if name.startswith(("OMP", "GOMP", "KMP"))} == {
            name: value for name, value in expected.items() if name.startswith(("OMP", "GOMP", "KMP"))
        }


def test_no_wheel_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spare, "is_for_cpus", lambda: False)
    assert added() is None


def test_which_variables_a_running_process_can_take_over() -> None:
    given = {"HOME": "/a", "OMP_NUM_THREADS": "2", "VLLM_A": "1"}
    assert spare._differences(given, given | {"VLLM_A": "2", "VLLM_B": "1", "LOCAL_WORLD_SIZE": "1"}) == []
    assert spare._differences(given, {"HOME": "/b", "LD_PRELOAD": "x"}) == ["HOME", "LD_PRELOAD", "OMP_NUM_THREADS"]
