"""What the spare process is started with, and which engines it can become."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.utils.system_utils import get_mp_context
from vllm.v1.engine import utils

from common import cgroup, cpu_threads, one_process, orphan_watch, spare


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, and a user who has said nothing."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(cgroup, "processors", lambda: None)
    monkeypatch.setattr(cpu_threads, "_GIVEN", None)
    monkeypatch.setattr(cpu_threads, "_cores", lambda _: [(0, 0), (0, 1)])
    for name in ("LD_PRELOAD", "OMP_NUM_THREADS", "GOMP_CPU_AFFINITY", "TORCHDYNAMO_DISABLE", cpu_threads.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(cpu_threads.VARIABLE, "")


def added() -> dict[str, str] | None:
    """What is expected beside what is there."""
    expected = spare._expected()
    return None if expected is None else dict(expected.items() - os.environ.items())


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> str:
    """What vLLM itself preloads where the user says nothing."""
    VllmConfig()
    found = os.environ["LD_PRELOAD"]
    assert "libgomp" in found
    monkeypatch.delenv("LD_PRELOAD")
    return found


def test_with_the_defaults(preloaded: str) -> None:
    assert added() == {
        "LD_PRELOAD": preloaded,
        "OMP_NUM_THREADS": "2",
        "GOMP_CPU_AFFINITY": "0 1",
        "TORCHDYNAMO_DISABLE": "1",
    }


def test_beside_what_the_user_preloads(preloaded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc.so")
    assert (added() or {})["LD_PRELOAD"] == f"libtcmalloc.so:{preloaded}"
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


def test_no_second_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "processors", lambda: 1.5)
    assert added() is None


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_collected_while_it_imports(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "what_engines_need.py").write_text(f"import gc\nseen = gc.isenabled()\nassert not {fails}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(spare, "_MODULES", ("what_engines_need",))
    gc.unfreeze()
    try:
        with pytest.raises(AssertionError) if fails else contextlib.nullcontext():
            spare._import_all()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
        module = sys.modules.pop("what_engines_need", None)
    assert gc.isenabled()
    assert fails or (module is not None and not module.seen)


class Started:
    """In the place of the process."""

    pid = 5

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.ended = False

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """What `start` starts."""
    monkeypatch.setattr(spare, "_Spare", Started)
    monkeypatch.setattr(spare, "_spare", None)
    monkeypatch.setenv(orphan_watch.VARIABLE, "")
    spare.start()
    process: Any = spare._spare
    assert isinstance(process, Started)
    assert process.environment[orphan_watch.VARIABLE].startswith(f"{os.getpid()} ")
    yield process
    assert spare.waiting() is None


def test_an_engine_that_it_suits(started: Started) -> None:
    assert spare.waiting() == started.pid
    with spare.moving_in(suits=True):
        assert utils.get_mp_context is spare._Context
        assert spare._take()  # as the process that vLLM starts does
    assert utils.get_mp_context is get_mp_context
    assert not started.ended
    with spare.moving_in(suits=True):
        assert utils.get_mp_context is get_mp_context


def test_an_engine_of_several_processes(started: Started) -> None:
    with spare.moving_in(suits=False):
        assert utils.get_mp_context is get_mp_context
        assert started.ended


def test_a_load_that_fails_before_it_needs_a_process(started: Started) -> None:
    with pytest.raises(RuntimeError), spare.moving_in(suits=True):
        raise RuntimeError
    assert utils.get_mp_context is get_mp_context
    assert spare.waiting() == started.pid
    assert not started.ended
    assert spare._take()


def test_a_load_can_do_without(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_environment: dict[str, str]) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(spare, "_Spare", fail)
    monkeypatch.setattr(spare, "_spare", None)
    monkeypatch.setenv(orphan_watch.VARIABLE, "")
    spare.start()
    assert "no more processes" in caplog.text
    assert spare.waiting() is None
