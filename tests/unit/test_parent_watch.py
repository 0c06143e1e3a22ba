"""The watch over the parent process, with small processes in everybody's place."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from backend.parent_watch import PATIENCE, watch_parent

ROOT = Path(__file__).resolve().parents[2]
# The parent starts the server, tells its process id, and stays; the server says what it is told, and does so.
PARENT = """
import subprocess, sys, time
server = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(server.pid, flush=True)
time.sleep(60)
"""
SERVER = """
import os, sys, time
from backend.parent_watch import watch_parent
def stop(cause):
    print("told:", cause, flush=True)
    {on_stop}
watch_parent(os.getppid(), 0.05, stop)
print("watching", flush=True)
{then}
"""
# A loop that hangs, in Python or with the interpreter's lock given back, and does not hear that it should stop.
DEAF = ["while True: pass", "time.sleep(60)"]


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A parent and its server, which runs the code of the parameter."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, request.param],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    assert parent.stderr is not None
    with parent:
        server = psutil.Process(int(parent.stdout.readline()))
        try:
            assert parent.stdout.readline() == "watching\n"
            yield parent, server
        finally:
            parent.kill()
            if server.is_running():
                server.kill()


def ends(server: psutil.Process, seconds: float) -> None:
    _, alive = psutil.wait_procs([server], timeout=seconds)
    assert not alive or server.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    "family", [SERVER.format(on_stop="os._exit(0)", then="time.sleep(60)")], indirect=True, ids=["hears"]
)
def test_the_server_is_told(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    parent, server = family
    time.sleep(0.3)
    assert server.is_running()
    parent.kill()
    ends(server, 10)
    assert parent.stdout is not None
    assert parent.stdout.read().startswith(f"told: the parent process {parent.pid} is gone")


@pytest.mark.parametrize("family", [SERVER.format(on_stop="pass", then=then) for then in DEAF], indirect=True, ids=DEAF)
def test_a_server_that_hangs_ends_all_the_same(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    parent, server = family
    parent.kill()
    ends(server, PATIENCE + 10)  # a loop without a pause leaves the watch little of a busy machine
    assert parent.stderr is not None
    assert "did not end by itself" in parent.stderr.read()


@pytest.mark.parametrize("parent", [0, 1])
def test_nobody_watches_init(parent: int) -> None:
    # Not our parent: a watch would notice at once.
    watch_parent(parent, 0.001, pytest.fail)
    time.sleep(0.05)
