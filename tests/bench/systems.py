"""What is measured: each system as a process with an engine, and what the same request is in its words."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from common.processes import is_resource_tracker
from tests.bench import client, in_process
from tests.bench.asks import EMBED, Ask, Fleet, prompt_text
from tests.bench.observed import Observed
from tests.process.orchestrator import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
# `vllm serve --grpc` warms its engine for up to 300 s before it calls itself ready.
LOAD_SECONDS = 420.0
_STOP_SECONDS = 15.0
# In which a server comes to rest that has met many connections.
_OPENED_SECONDS = 0.5
_LOAD_POLL_SECONDS = 0.25
_LOG_BYTES = 6000


class SystemFailedError(Exception):
    """A system did not become ready, or died, or refused what all others do."""


class System(ABC):
    """One process with an engine; a context manager that ends it and all that it has started.

    Attributes:
        name: in tables.
        pid: of the process that serves clients; the engine's processes are its children.

    """

    name: str
    pid: int

    def __init__(self, fleet: Fleet, threads: int) -> None:
        self.fleet = fleet
        self._threads = threads
        self._left: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        self._stderr = tempfile.TemporaryFile()
        environment = {
            **os.environ,
            # The same room for all: one core is left to those who serve.
            "OMP_NUM_THREADS": str(self._threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            # A step of the engine may be under way when its system is stopped, and the others' turns may take minutes.
            "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(24 * 3600),
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.tied", *self.argv()],
            env=environment,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if self.speaks else subprocess.DEVNULL,
            stderr=self._stderr,
            start_new_session=True,
        )
        self.pid = self.process.pid
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)
        # What is shared stays for good where its tracker is killed first.
        trackers = {process for process in self._left if is_resource_tracker(process)}
        _killed(self._left - trackers)
        psutil.wait_procs(trackers, timeout=5)
        _killed(trackers)
        self.process.wait(5)
        if self.process.stdin:
            self.process.stdin.close()
        if self.process.stdout:
            self.process.stdout.close()
        self._stderr.close()

    def end(self) -> None:
        """Ask it to end, without waiting; a stopped process would not hear of it."""
        self.resume()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)

    on_demand = False
    """Whether it is measured only where it is named."""
    speaks = False
    """Whether it answers on stdout."""

    @abstractmethod
    def argv(self) -> list[str]:
        """How it is started."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Return when the model is loaded."""

    @abstractmethod
    def play(self, ask: Ask, streams: int, connections: int) -> Observed:
        """So many requests at once."""

    def beside(self, ask: Ask, connections: int) -> contextlib.AbstractContextManager[Any]:
        """So many connections, open until the block ends, on which nothing is asked."""
        return contextlib.nullcontext()

    @abstractmethod
    def tokens(self, ask: Ask, last: bytes) -> tuple[int, int]:
        """Of a prompt and of its answer, by the last message; of an embedding its dimension in the second's place."""

    def cpu(self) -> float:
        """Seconds of processor time that the serving process has taken in all its threads, without its children."""
        return seconds(self.pid)

    def memory(self) -> tuple[int, int]:
        """Resident bytes of the serving process, and of it with all its children."""
        process = psutil.Process(self.pid)
        mine = process.memory_info().rss
        return mine, mine + sum(child.memory_info().rss for child in process.children(recursive=True))

    def pause(self) -> None:
        """Stop all its processes until `resume`: idle engines look for work now and then."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        self._remember()
        for process in self._left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _remember(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            self._left |= {process, *process.children(recursive=True)}

    def log(self) -> str:
        """The end of what it has written to stderr."""
        # By position: to seek would move its own place, too.
        written = os.fstat(self._stderr.fileno()).st_size
        return os.pread(self._stderr.fileno(), _LOG_BYTES, max(written - _LOG_BYTES, 0)).decode(errors="replace")

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Poll until it is; raises SystemFailedError with its log where it ends before, or after `LOAD_SECONDS`."""
        deadline = time.monotonic() + LOAD_SECONDS
        while not is_ready():
            self._remember()
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemFailedError(f"{self.name} did not become ready:\n{self.log()}")
            time.sleep(_LOAD_POLL_SECONDS)


def _killed(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def seconds(pid: int) -> float:
    """Of processor time that the process has taken."""
    # clock_getcpuclockid(3): of a process, by its id.
    return time.clock_gettime((~pid << 3) | 2)


class InProcess(System):
    """`AsyncLLM`, without a server."""

    name = "in process"
    speaks = True

    def __init__(self, fleet: Fleet, threads: int) -> None:
        super().__init__(fleet, threads)
        self._prompts: dict[tuple[str, str], str] = {}

    def argv(self) -> list[str]:
        arguments = {"model": str(self.fleet.model), **self.fleet.engine}
        return [sys.executable, "-m", "tests.bench.in_process", json.dumps(arguments)]

    def wait_ready(self) -> None:
        assert self.process.stdout
        line = self.process.stdout.readline()
        self.wait_until(lambda: line == b"ready\n")

    def play(self, ask: Ask, streams: int, connections: int) -> Observed:
        kind = "embed" if ask.scenario == EMBED else "stream" if ask.stream else "unary"
        job = in_process.Job(kind, prompt_text(self.fleet.model, ask), streams, ask.tokens)
        return _answer(self.process, job)

    def tokens(self, ask: Ask, last: bytes) -> tuple[int, int]:
        prompt, completion = json.loads(last)
        return prompt, completion


class Server(System):
    """A system with a port, asked by `tests.bench.client`."""

    protocol = "grpc"

    def __init__(self, fleet: Fleet, threads: int, player: "Player") -> None:
        super().__init__(fleet, threads)
        self.port = free_port()
        self._player = player

    def play(self, ask: Ask, streams: int, connections: int) -> Observed:
        bodies = [self.body(ask).hex() for _ in range(streams)]
        return self._player.play(client.Job(self.protocol, self.port, self.path(ask), bodies, connections))

    @contextlib.contextmanager
    def beside(self, ask: Ask, connections: int) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                opened = [
                    client.connection(self.protocol, self.port, self.path(ask)).socket for _ in range(connections)
                ]
            except OSError as error:
                raise SystemFailedError(f"{connections} connections: {error}") from error
            for each in opened:
                stack.enter_context(each)
            if connections:
                time.sleep(_OPENED_SECONDS)
            yield
            if closed := sum(map(_is_closed, opened)):
                raise SystemFailedError(f"{closed} of {connections} idle connections were closed")

    @abstractmethod
    def path(self, ask: Ask) -> str:
        """Of the method or URL."""

    @abstractmethod
    def body(self, ask: Ask) -> bytes:
        """Of one request."""


class Player:
    """The process that asks servers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def play(self, job: client.Job) -> Observed:
        """Have it played."""
        return _answer(self._process, job)


@contextlib.contextmanager
def running(systems: Sequence[System]) -> Iterator[None]:
    """All of them loaded, and paused; ended with the block."""
    with contextlib.ExitStack() as stack:
        for system in systems:
            stack.enter_context(system)
        for system in systems:
            system.wait_ready()
            print(f"{system.name} is ready", file=sys.stderr, flush=True)
        for system in systems:
            system.pause()
        try:
            yield
        finally:
            for system in systems:
                system.end()


def _is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answer(process: "subprocess.Popen[bytes]", job: Any) -> Observed:
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemFailedError(f"the process of {type(job).__module__} ended")
    answer = json.loads(line)
    if isinstance(answer, str):
        raise SystemFailedError(answer)
    return Observed(**answer)
