"""Child processes: in sight, measured, and gone when they are to go."""

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from common import processes
from common.processes import engine_processes, kill, leave_ray, memory_by_process, remove_registrations

ROOT = Path(__file__).resolve().parents[2]
# A child that starts another one, ignores polite requests, and says when both are there.
PARENT = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def family() -> Iterator[list[int]]:
    """The ids of a child and of its own child."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ids = [parent.pid, int(parent.stdout.readline())]
        yield ids
        for pid in ids:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


def test_all_generations_are_in_sight(family: list[int]) -> None:
    assert set(family) <= {process.pid for process in engine_processes()}


# Has a child with a child of its own. The child ends at the moment of the first or of the second look at all processes.
ADOPTING = """
import subprocess, sys
import psutil
from common.processes import adopt_orphans, engine_processes
adopt_orphans()
child = subprocess.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
grandchild = int(child.stdout.readline())
looks, look = [], psutil._ppid_map
def last_look():
    looks.append(look())
    if len(looks) == int(sys.argv[1]):
        child.kill()
        child.wait()
    return looks[-1]
psutil._ppid_map = last_look
try:
    found = engine_processes()
finally:
    psutil.Process(grandchild).kill()
print([process.pid for process in found] == [grandchild], len(looks))
"""


@pytest.mark.parametrize(("fatal", "looks"), [(1, 2), (2, 3)])
def test_one_that_ends_during_a_look_hides_nobody(fatal: int, looks: int) -> None:
    argv = [sys.executable, "-c", ADOPTING, str(fatal)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = subprocess.run(argv, check=False, env=environ, capture_output=True, text=True)
    assert script.stdout == f"True {looks}\n", script.stderr


def test_looks_come_to_an_end_where_processes_come_and_go(family: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = map(psutil.Process, family)
    looks = itertools.cycle([[parent], [child]])
    monkeypatch.setattr(processes, "_look", lambda: next(looks))
    assert {process.pid for process in engine_processes()} == set(family)


@pytest.mark.parametrize(
    ("word", "is_tracker"),
    [
        ("from multiprocessing.resource_tracker import main;main(3)", True),
        ("a/model/of/the/name/resource_tracker", False),
    ],
)
def test_the_resource_tracker_is_not_among_them(word: str, is_tracker: bool) -> None:
    waiting = "import time; print('here', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", waiting, word], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # a process that has only just begun has no command line yet
        found = {process.pid for process in engine_processes()}
        process.kill()
    assert (process.pid not in found) is is_tracker


def test_memory(family: list[int]) -> None:
    sizes = memory_by_process()
    assert sizes["server"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
    for pid in family:
        (name,) = [name for name in sizes if name.endswith(f" {pid}")]
        assert sizes[name] > 0
        assert os.sep not in name


async def test_kill(family: list[int]) -> None:
    processes = [psutil.Process(pid) for pid in family]
    registrations = [Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}") for pid in family]
    for registration in registrations:
        registration.touch()
    await asyncio.wait_for(kill(processes), 10)
    assert not any(map(Path.exists, registrations))
    for process in processes:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    await kill(processes)  # nothing is left to do
    await kill([])


@pytest.fixture
def registration() -> Iterator[Callable[[int, int], Path]]:
    """Makes what OpenMP would for a process and a user."""
    with contextlib.ExitStack() as stack:

        def make(pid: int, user: int) -> Path:
            path = Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{user}")
            stack.callback(path.unlink, missing_ok=True)
            path.touch()
            return path

        yield make


def test_what_openmp_leaves_of_the_dead(registration: Callable[[int, int], Path]) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    left = registration(gone.pid, os.getuid())
    remove_registrations()
    assert not left.exists()
    # As a clock has it that was set since, or as a server has left it that was killed.
    os.utime(registration(gone.pid, os.getuid()), (0, 0))
    alive, foreign = registration(os.getpid(), os.getuid()), registration(gone.pid, os.getuid() + 1)
    remove_registrations()
    assert not left.exists()
    assert alive.exists()
    assert foreign.exists()
    remove_registrations([os.getpid()])
    assert not alive.exists()


def test_what_openmp_leaves_of_a_process_that_nobody_has_waited_for(
    registration: Callable[[int, int], Path],
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        left = registration(process.pid, os.getuid())
        remove_registrations()
        assert left.exists()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.pid_exists(process.pid)
        remove_registrations()
        assert not left.exists()


def test_what_no_process_of_ours_has_left(
    registration: Callable[[int, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may make such a file; and a process with its id may be another user's, of which nothing is told."""
    impossible, foreign = registration(99_999_999_999, os.getuid()), registration(os.getppid(), os.getuid())

    def denied(process: psutil.Process) -> str:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "status", denied)
    remove_registrations()
    assert impossible.exists()
    assert foreign.exists()


async def test_a_killed_child_of_multiprocessing_leaves_no_pipe() -> None:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    child.start()
    await kill([psutil.Process(child.pid)])
    # Reaped by anybody but multiprocessing it would stay among these, with its pipes, for good.
    assert child not in multiprocessing.active_children()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("connected", [True, False])
def test_ray_is_left_where_it_is_used(monkeypatch: pytest.MonkeyPatch, connected: bool) -> None:
    left: list[str] = []
    ray = SimpleNamespace(is_initialized=lambda: connected, shutdown=lambda: left.append("ray"))
    monkeypatch.setitem(sys.modules, "ray", cast("Any", ray))
    leave_ray()
    assert left == ["ray"] * connected


def test_ray_that_does_not_let_go(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ray = SimpleNamespace(is_initialized=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "ray", cast("Any", ray))
    leave_ray()
    assert "could not disconnect" in caplog.text


FAULTS = """
import ctypes, resource
from common.processes import keep_large_blocks
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():
    blocks = [libc.malloc(24 << 20) for _ in range(3)]
    for block in blocks:
        libc.memset(block, 1, 24 << 20)
    for block in blocks:
        libc.free(block)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("call", "kept"), [("keep_large_blocks()", True), ("", False)])
def test_large_blocks_are_kept(call: str, kept: bool) -> None:
    script = FAULTS.format(call=call)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)
    faults = int(done.stdout)
    # Of 4 KiB each they would be 184,320; without the call glibc gives at least some back each time.
    assert (faults < 1000) is kept
