"""Processes of a server that is gone, with small processes in the place of the engine's."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.orphan_watch import VARIABLE, watch_server

ROOT = Path(__file__).resolve().parents[2]
# Announces itself, starts a process that watches it, tells that process's id, and stays.
SERVER = """
import subprocess, sys, time
from common.orphan_watch import announce
announce()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = "import time; from common.orphan_watch import watch_server as w; w(); print(1, flush=True); time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_goes_with_its_server(number: signal.Signals) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, CHILD],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert server.stdout is not None
    with server, server.stdout:
        child = psutil.Process(int(server.stdout.readline()))
        try:
            assert child.is_running()
            server.send_signal(number)
            server.wait(10)
            _, alive = psutil.wait_procs([child], timeout=10)
            assert not alive or child.status() == psutil.STATUS_ZOMBIE
        finally:
            if child.is_running():
                child.kill()


# As vLLM's processes are: spawned by multiprocessing out of a thread; and then deaf to all but the kernel, as one is
# that imports or computes: `PyDLL` keeps the interpreter's lock for the whole call.
SPAWNING_SERVER = """
import ctypes, multiprocessing, os, sys, threading, time
from common import orphan_watch

def work():
    print(os.getpid(), os.getpgid(0) == os.getpid(), flush=True)
    ctypes.PyDLL(None).sleep(60)

if __name__ == "__mp_main__":
    orphan_watch.begin()
if __name__ == "__main__":
    orphan_watch.announce()
    process = multiprocessing.get_context("spawn").Process(target=work)

    def spawn():
        process.start()
        time.sleep(60)

    threading.Thread(target=spawn, daemon=True).start()
    time.sleep(60)
"""


def test_the_kernel_ends_a_process_that_can_do_nothing_itself(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SPAWNING_SERVER)
    server = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert server.stdout is not None
    with server, server.stdout:
        pid, own_group = server.stdout.readline().split()
        child = psutil.Process(int(pid))
        try:
            assert own_group == "True"
            assert child.is_running()
            server.kill()
            server.wait(10)
            _, alive = psutil.wait_procs([child], timeout=5)
            assert not alive or child.status() == psutil.STATUS_ZOMBIE
        finally:
            server.kill()
            if child.is_running():
                child.kill()


def test_ends_at_once_where_the_server_is_gone_already() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait(10)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: f"{gone.pid} 12345"}
    ended = subprocess.run([sys.executable, "-c", CHILD], env=environment, timeout=30, check=False)
    assert ended.returncode == -signal.SIGKILL


def test_nothing_is_watched_without_an_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    watch_server()
