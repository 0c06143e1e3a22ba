"""`run.sh worker` with a small program in the place of vLLM: signals, exit statuses, heads that go, the frontend."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from tests.frontend import StandInFrontend
from tests.process.orchestrator import REPOSITORY, free_port

# Connects to its head as often as it takes, and again when that has gone, as ZeroMQ does; a child of it can't be asked
# to end. BEHAVIOUR says what it does otherwise.
RANK = """\
#!/bin/sh
''':'
# A path with a blank can't stand in the first line.
exec "{python}" -IS "$0" "$@"
'''
import os, signal, socket, subprocess, sys, time
behaviour = os.environ["BEHAVIOUR"]
if behaviour.startswith("fails"):
    sys.exit(int(behaviour[5:]))
if behaviour.startswith("deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
connections = []
def dawdle(status):
    # As vLLM: its connections are closed first, and its main process ends last.
    for connection in connections:
        connection.close()
    time.sleep(1.5)
    sys.exit(status)
if behaviour == "dawdles":
    signal.signal(signal.SIGTERM, lambda *_: dawdle(7))
child = subprocess.Popen(["sh", "-c", "trap '' TERM INT; while :; do sleep 1; done"], start_new_session=True)
if "shares" in behaviour:
    import multiprocessing
    from multiprocessing import shared_memory
    memory = shared_memory.SharedMemory(create=True, size=4096)
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    with open(f"{{__file__}}.{{os.getpid()}}", "w") as names:
        print(memory.name, f"sem.{{semaphore._semlock.name[1:]}}", file=names)
if "stuck" in behaviour:
    tracker = "from multiprocessing.resource_tracker import main; import time; time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", tracker])
print("rank", os.getpid(), child.pid, *sys.argv[1:], flush=True)
print(*(f"{{name}}={{value}}" for name, value in os.environ.items()), flush=True)
if "HTTPS_PROXY" in os.environ:
    proxy = socket.create_connection(("127.0.0.1", int(os.environ["HTTPS_PROXY"].rpartition(":")[2])))
port = int(sys.argv[sys.argv.index("--data-parallel-rpc-port") + 1])
while True:
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connections[:] = [connection]
            if behaviour.startswith("crashes"):
                time.sleep(1)
                if behaviour == "crashes slowly":
                    dawdle(0)
                sys.exit(4)
            connection.recv(1)
    except OSError:
        time.sleep(0.05)
"""
MAIN = "import sys, pathlib; from backend import worker; worker.main(sys.argv[2:], pathlib.Path(sys.argv[1]))"
FLAGS = ("--data-parallel-size=2", "--data-parallel-size-local=1", "--start-rank=1", "--master-addr=127.0.0.1")
TOKEN = "-".join("token")
SECONDS = 20.0


class Worker:
    """A worker on its way, and what it and its ranks have written."""

    def __init__(self, process: asyncio.subprocess.Process, errors: Path, port: int) -> None:
        self.process = process
        self.port = port
        self._errors = errors
        self.seen: set[psutil.Process] = set()

    async def rank(self) -> tuple[int, list[str], str]:
        """The process id of the next rank, its arguments, and its environment."""
        assert self.process.stdout
        async with asyncio.timeout(SECONDS):
            words = (await self.process.stdout.readline()).decode().split()
            environment = (await self.process.stdout.readline()).decode()
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        assert words[0] == "rank", self.errors
        return int(words[1]), words[3:], environment

    async def ends(self) -> int:
        """Its exit status; with it, everything of it is gone."""
        async with asyncio.timeout(SECONDS):
            status = await self.process.wait()
        assert not [each for each in self.seen if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        return status

    @property
    def errors(self) -> str:
        return self._errors.read_text()


@contextlib.asynccontextmanager
async def worker(folder: Path, behaviour: str, *flags: str, **environ: str) -> AsyncIterator[Worker]:
    program = folder / "run.sh"
    program.write_text(RANK.format(python=sys.executable))
    program.chmod(0o755)
    port = free_port()
    argv = [sys.executable, "-c", MAIN, str(program), "a/model", *FLAGS, f"--master-port={port}", *flags]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "BEHAVIOUR": behaviour, **environ}
    errors = folder / "errors"
    with errors.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv, env=environment, stdout=asyncio.subprocess.PIPE, stderr=stderr, process_group=0
        )
    found = Worker(process, errors, port)
    try:
        yield found
    finally:
        if process.returncode is None:
            for each in {*found.seen, *psutil.Process(process.pid).children(recursive=True)}:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.kill()
            await process.wait()


def head(port: int) -> socket.socket:
    """What ranks connect to."""
    server = socket.create_server(("127.0.0.1", port))
    server.settimeout(SECONDS)
    return server


async def accept(server: socket.socket) -> socket.socket:
    return (await asyncio.to_thread(server.accept))[0]


async def test_what_a_rank_is_started_with(tmp_path: Path) -> None:
    async with worker(tmp_path, "", "--vllm-arg", "--dtype=float32", LOCALAI_REGISTRATION_TOKEN=TOKEN) as running:
        _, argv, environment = await running.rank()
        assert argv[:3] == ["serve", "a/model", "--headless"]
        assert argv[-1] == "--dtype=float32"
        assert "VLLM_DP_RANK=1" in environment.split()
        assert TOKEN not in environment
        running.process.send_signal(signal.SIGTERM)
        assert await running.ends() == 7


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 7), (signal.SIGINT, 128 + 9)])
async def test_signals_are_passed_on_and_the_status_is_the_rank_s(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    async with worker(tmp_path, "") as running:
        await running.rank()
        running.process.send_signal(number)
        assert await running.ends() == status


async def test_a_second_signal_kills(tmp_path: Path) -> None:
    async with worker(tmp_path, "deaf") as running:
        await running.rank()
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1)
        assert running.process.returncode is None
        running.process.send_signal(signal.SIGTERM)
        assert await running.ends() == 128 + 9


async def test_the_end_of_a_rank_that_was_told_to_is_not_the_head_s(tmp_path: Path) -> None:
    async with worker(tmp_path, "dawdles") as running:
        await running.rank()
        with head(running.port) as server, await accept(server):
            await asyncio.sleep(1)
            running.process.send_signal(signal.SIGTERM)
            assert await running.ends() == 7
        assert "the head is gone" not in running.errors


@pytest.mark.parametrize(("behaviour", "status"), [("fails3", 3), ("fails0", 1)])
async def test_ranks_that_cannot_run_are_not_started_again(tmp_path: Path, behaviour: str, status: int) -> None:
    async with worker(tmp_path, behaviour) as running:
        assert await running.ends() == status
        assert running.errors.count("ranks started") == 1


async def test_ranks_wait_for_a_way_to_their_head(tmp_path: Path) -> None:
    async with worker(tmp_path, "", "--master-addr=no.such.head.invalid") as running:
        async with asyncio.timeout(SECONDS):
            while "once there is a way to their head" not in running.errors:  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.05)
        assert "ranks started" not in running.errors
        running.process.send_signal(signal.SIGTERM)
        assert await running.ends() == 0


async def test_a_head_that_goes_and_the_next_one(tmp_path: Path) -> None:
    async with worker(tmp_path, "deaf") as running:
        for _ in range(2):
            pid, _, _ = await running.rank()
            with head(running.port) as server:
                connection = await accept(server)
                await asyncio.sleep(1)
                assert psutil.pid_exists(pid)
            connection.close()
        third, _, _ = await running.rank()
        assert not psutil.pid_exists(pid)
        await asyncio.sleep(1.5)
        assert psutil.pid_exists(third)  # which waits, for there is no head
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.6)
        running.process.send_signal(signal.SIGTERM)
        await running.ends()


async def test_what_killed_ranks_shared_goes_with_them(tmp_path: Path) -> None:
    """It is Python's resource tracker that removes it, once all others are gone."""
    async with worker(tmp_path, "deaf, shares") as running, contextlib.AsyncExitStack() as stack:
        first, _, _ = await running.rank()
        shared = stack.enter_context(shared_by(tmp_path, first))
        with head(running.port) as server, await accept(server):
            await asyncio.sleep(1)
        second, _, _ = await running.rank()
        assert not any(path.exists() for path in shared)
        shared = stack.enter_context(shared_by(tmp_path, second))
        running.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.6)
        running.process.send_signal(signal.SIGTERM)
        assert await running.ends() == 128 + 9
        assert not any(path.exists() for path in shared)
        assert "the resource tracker" not in running.errors


async def test_a_resource_tracker_that_does_not_end_is_killed(tmp_path: Path) -> None:
    async with worker(tmp_path, "shares, stuck") as running:
        pid, _, _ = await running.rank()
        with shared_by(tmp_path, pid) as shared:
            running.process.send_signal(signal.SIGTERM)
            assert await running.ends() == 7
            assert not any(path.exists() for path in shared)
        assert running.errors.count("the resource tracker did not end: killed") == 1


@contextlib.contextmanager
def shared_by(folder: Path, pid: int) -> Iterator[list[Path]]:
    """Shared memory and a semaphore of a rank, which are not left by this test."""
    shared = [Path("/dev/shm", name) for name in (folder / f"run.sh.{pid}").read_text().split()]
    assert all(path.exists() for path in shared)
    try:
        yield shared
    finally:
        for path in shared:
            path.unlink(missing_ok=True)


async def test_a_proxy_on_the_head_s_machine_is_not_the_head(tmp_path: Path) -> None:
    with head(free_port()) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        async with worker(tmp_path, "", HTTPS_PROXY=url) as running:
            first, _, _ = await running.rank()
            with await accept(proxy):
                await asyncio.sleep(1)
                assert "connected with the head" not in running.errors
                with head(running.port) as server, await accept(server):
                    await asyncio.sleep(1)
                    assert "connected with the head" in running.errors
                second, _, _ = await running.rank()
                assert second != first
                assert not psutil.pid_exists(first)
                (await accept(proxy)).close()
                running.process.send_signal(signal.SIGTERM)
                assert await running.ends() == 7


async def test_a_head_that_is_another_one_at_the_next_look(tmp_path: Path) -> None:
    """Ranks of ZeroMQ connect again at once; what they said to the former head, the next has not heard."""
    async with worker(tmp_path, "") as running:
        pid, _, _ = await running.rank()
        with head(running.port) as server:
            connection = await accept(server)
            await asyncio.sleep(1)
            connection.close()
            second, _, _ = await running.rank()
            assert second != pid
            assert not psutil.pid_exists(pid)
            running.process.send_signal(signal.SIGTERM)
            assert await running.ends() == 7


@pytest.mark.parametrize(("behaviour", "status"), [("crashes", 4), ("crashes slowly", 0)])
async def test_ranks_that_crash_are_started_again(tmp_path: Path, behaviour: str, status: int) -> None:
    async with worker(tmp_path, behaviour) as running:
        with head(running.port) as server:
            connections = []
            for _ in range(3):
                await running.rank()
                connections.append(await accept(server))
            for connection in connections:
                connection.close()
        assert f"exit status {status}; the next start is in 1 s" in running.errors
        assert f"exit status {status}; the next start is in 2 s" in running.errors
        running.process.send_signal(signal.SIGTERM)
        await running.ends()


async def test_a_life_at_the_frontend(tmp_path: Path) -> None:
    async with StandInFrontend(token=TOKEN) as frontend:
        frontend.in_flight = [1]
        flags = (f"--register-to={frontend.url}", "--node-name=b", "--node-labels=zone=x", "--heartbeat-interval=100ms")
        async with worker(tmp_path, "", *flags, LOCALAI_REGISTRATION_TOKEN=TOKEN) as running:
            _, argv, environment = await running.rank()
            assert frontend.calls[0] == "register"
            await frontend.until("heartbeat", 2)
            assert "deregister" not in frontend.calls
            running.process.send_signal(signal.SIGTERM)
            assert await running.ends() == 7
            assert TOKEN not in environment + running.errors + " ".join(argv)
    assert frontend.calls[-4:] == ["drain", "models", "models", "deregister"]
    (body,) = frontend.registrations
    assert body["labels"] == {"zone": "x", "node.role": "vllm-follower"}
    assert (body["name"], body["node_type"], body["token"]) == ("b", "agent", TOKEN)
    assert {"total_vram", "available_vram", "gpu_vendor"} < body.keys()
    assert {"available_ram", "available_vram"} & frontend.heartbeats[0].keys()


async def test_no_rank_runs_unregistered(tmp_path: Path) -> None:
    async with StandInFrontend() as frontend:
        frontend.fault = lambda _what: web.Response(status=403, text="no such node wanted")
        async with worker(tmp_path, "", f"--register-to={frontend.url}") as running:
            assert await running.ends() == 1
            assert "ranks started" not in running.errors
            last = running.errors.splitlines()[-1]
            assert last == f"backend: registering with {frontend.url} failed: 403 Forbidden: no such node wanted"


async def test_a_signal_while_the_frontend_is_waited_for(tmp_path: Path) -> None:
    async with StandInFrontend() as frontend:
        frontend.delay = 30
        async with worker(tmp_path, "", f"--register-to={frontend.url}") as running:
            await frontend.until("register")
            running.process.send_signal(signal.SIGTERM)
            assert await running.ends() == 0
            assert "ranks started" not in running.errors


async def test_flags_that_cannot_be_used() -> None:
    flags = [flag.replace("start-rank=1", "start-rank=0") for flag in FLAGS]
    argv = [str(REPOSITORY / "run.sh"), "worker", "a/model", *flags, "--master-port=1"]
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert errors.decode().startswith("backend: --start-rank 0: is the head's, which LoadModel starts; use 1 or more")
