"""An orchestrator in small: spawns run.sh, asks it over a new connection each time, and ends its process group.

It does what LocalAI's process manager and gRPC client do, where a server could notice the difference: descriptor 0 is
closed, the server leads a process group, its output goes to files, no connection is used for two RPCs, and the stop is
SIGTERM to the group, 15 seconds of patience, then SIGKILL. What it adds is distrust: at the end no process may be left,
neither in the group nor out of it, and no socket and no shared memory, unless the server itself was killed.
"""

import contextlib
import datetime
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import psutil

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_SH = REPOSITORY / "run.sh"

# The orchestrator's own deadlines, in seconds.
PORT_SECONDS = 3.0  # what the server promises; the orchestrator itself gives it 30
PROBE_SECONDS = 2.0
FREE_SECONDS = 5.0
STOP_SECONDS = 15.0
DEATH_SECONDS = 10.0
# Longest that a test waits for what has no deadline of its own.
PATIENCE_SECONDS = 120.0

_POLL_SECONDS = 0.1
_MESSAGE_BYTES = 50 * 1024 * 1024
_MARK = "ORCHESTRATOR_TEST_MARK"
# A small engine, whose threads share the cores with those of the tests.
ENGINE_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# Closes descriptor 0 between fork and exec, as a nil file does in Go; the process id stays.
_SPAWN = ("bash", "-c", 'exec "$@" <&-', "spawn")


@dataclass(frozen=True)
class Stop:
    """How a stop went: the server's exit status (negative: a signal), and how long it took."""

    status: int
    seconds: float
    killed: bool
    """Whether the group was still there after `STOP_SECONDS` and got SIGKILL."""


class Backend:
    """One server process, from its spawn to its end; a context manager.

    Attributes:
        addr: where it listens, as a client names it.
        pid: of the server, which is also its process group.
        temporary: its temporary folder, unless `env` names another.

    """

    def __init__(
        self,
        *,
        run_sh: Path | str = RUN_SH,
        addr: str | None = None,
        argv: Sequence[str] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.addr = f"127.0.0.1:{free_port()}" if addr is None else addr
        self._argv = [str(run_sh), *(("--addr", self.addr) if argv is None else argv)]
        self._cwd = cwd or Path(run_sh).parent
        mark = uuid.uuid4().hex
        self._mark = f"{_MARK}={mark}"
        self._env = {**ENGINE_ENVIRONMENT, **(env or {}), _MARK: mark}
        self._seen: set[psutil.Process] = set()
        self._pids: set[int] = set()
        self._registrations = _registrations()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="orchestrator-")
        self._stdout, self._stderr = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        self.temporary = Path(self._folder.name) / "tmp"
        self.temporary.mkdir()
        environment = os.environ | {"TMPDIR": str(self.temporary)} | self._env
        self.spawned = time.monotonic()
        with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*_SPAWN, *self._argv], stdout=stdout, stderr=stderr, cwd=self._cwd, env=environment, process_group=0
            )
        self.pid = self._process.pid
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            left = self._end()
            if self._process.returncode >= 0:
                left += self.left_files()
            if exc is not None:
                # pytest shows it with the failure.
                print(f"\n--- stderr of run.sh ---\n{self.stderr[-8000:]}")
            elif left:
                raise AssertionError(f"left behind: {left}")
        finally:
            self._folder.cleanup()

    # What the orchestrator asks

    def wait_for_health(self, seconds: float = PORT_SECONDS) -> float:
        """Poll Health until it says OK; returns the seconds since the spawn."""
        deadline = self.spawned + seconds
        while True:
            try:
                reply = self.call("Health", pb.HealthMessage(), timeout=PROBE_SECONDS)
            except grpc.RpcError as error:
                if self.exit_status is not None:
                    raise AssertionError(f"exit status {self.exit_status}: {self.last_stderr_line}") from error
                if time.monotonic() > deadline:
                    raise AssertionError(f"no Health within {seconds} s") from error
                time.sleep(0.02)
            else:
                assert reply.message == b"OK"
                return time.monotonic() - self.spawned

    @contextlib.contextmanager
    def connection(self, **options: Any) -> Iterator[pb_grpc.BackendStub]:
        """A stub on a connection of its own, closed at the end of the block."""
        with connect(self.addr, **options) as stub:
            yield stub

    def call(self, rpc: str, request: Any, timeout: float | None = PATIENCE_SECONDS) -> Any:
        """A unary RPC on a new connection."""
        with self.connection() as stub:
            return getattr(stub, rpc)(request, timeout=timeout)

    def stream(self, request: pb.PredictOptions, timeout: float | None = PATIENCE_SECONDS) -> list[pb.Reply]:
        """All chunks of a PredictStream on a new connection."""
        with self.connection() as stub:
            return list(stub.PredictStream(request, timeout=timeout))

    def load(self, options: pb.ModelOptions) -> pb.Result:
        """LoadModel, whatever it answers."""
        result: pb.Result = self.call("LoadModel", options)
        return result

    def status(self) -> pb.StatusResponse:
        """Status, with the deadline of a probe."""
        status: pb.StatusResponse = self.call("Status", pb.HealthMessage(), timeout=PROBE_SECONDS)
        return status

    # What the orchestrator sees

    @property
    def stderr(self) -> str:
        """All that the process and its children have written so far."""
        return self._stderr.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        """As `stderr`."""
        return self._stdout.read_text(errors="replace")

    @property
    def last_stderr_line(self) -> str:
        """The last line that is not empty: what the orchestrator reports as the cause of a death."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @property
    def exit_status(self) -> int | None:
        """As `Popen.returncode`; None while it runs."""
        return self._process.poll()

    def wait_for_exit(self, seconds: float) -> int:
        """The exit status of a process that ends by itself."""
        return self._process.wait(seconds)

    # Its processes

    def processes(self) -> list[psutil.Process]:
        """All that are left of what was started, wherever they have gone since."""
        found = set(self._seen)
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(psutil.Process(self.pid).children(recursive=True))
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.getpgid(process.pid) == self.pid or self._is_marked(process.pid):
                    found.add(process)
        # A process of a group that nobody has waited for yet is a zombie: gone, for our purposes.
        self._pids |= {process.pid for process in found}
        self._seen = {process for process in found if _alive(process)}
        return sorted(self._seen, key=lambda process: process.pid)

    def children(self) -> list[psutil.Process]:
        """The processes beside the server itself, without Python's resource tracker."""
        return [
            process
            for process in self.processes()
            if process.pid != self.pid and "resource_tracker" not in name(process)
        ]

    def engine_processes(self) -> list[psutil.Process]:
        """The same without the process that waits to become an engine's, see `common.spare`."""
        return [process for process in self.children() if "spare" not in name(process).lower()]

    def spares(self) -> list[psutil.Process]:
        """That process, as long as it waits."""
        return [process for process in self.children() if "spare" in name(process).lower()]

    def left(self) -> list[str]:
        """What the processes beside the server call themselves.

        One that ends while it is looked at has no name any more, and is none that is left.
        """
        return [called for process in self.children() if (called := name(process))]

    def left_files(self) -> list[str]:
        """Sockets in its temporary folder, the folders for them, and what OpenMP keeps of processes that are gone."""
        alive = {process.pid for process in self.processes()}
        return [
            str(path.relative_to(self.temporary))
            for path in self.temporary.rglob("*")
            if path.is_socket() or path.name.startswith(("zmq-", "backend-"))
        ] + [name for name, pid in _registrations() - self._registrations if pid in self._pids - alive]

    def engine_cores(self) -> list[psutil.Process]:
        """The processes that call themselves EngineCore."""
        return [process for process in self.children() if "EngineCore" in name(process)]

    def rss(self) -> int:
        """Resident bytes of the server process."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def _is_marked(self, pid: int) -> bool:
        """By the environment that it was started with, or, as a process title overwrites that, by its stdout."""
        proc = Path(f"/proc/{pid}")
        return self._mark.encode() in (proc / "environ").read_bytes() or (proc / "fd/1").readlink() == self._stdout

    # Its end

    def stop(self) -> Stop:
        """SIGTERM to the group, a look every 100 ms, SIGKILL when the patience is at its end."""
        self.processes()  # remembers those that leave the group before they are looked for
        started = time.monotonic()
        self._signal_group(signal.SIGTERM)
        killed = False
        while self.exit_status is None:
            if time.monotonic() - started > STOP_SECONDS:
                killed = True
                self._signal_group(signal.SIGKILL)
                self._process.wait()
                break
            time.sleep(_POLL_SECONDS)
        stop = Stop(self._process.returncode, time.monotonic() - started, killed)
        print(f"stop: exit status {stop.status} after {stop.seconds:.1f} s")
        return stop

    def signal_leader(self, number: int) -> None:
        """A signal to the server process alone."""
        os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """A signal to the server and all that is in its group."""
        self.processes()
        self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _end(self) -> list[str]:
        """Stop it where it runs, and end whatever is left; returns what had to be ended that way."""
        if self.exit_status is None:
            self.stop()
        # The orchestrator looks no further once the leader is gone; its children may have a moment to follow.
        with contextlib.suppress(TimeoutError):
            eventually(lambda: not self.processes(), 2.0, "all processes gone")
        left = self.processes()
        described = [f"{process.pid} {name(process)}" for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        return described


def _registrations() -> set[tuple[str, int]]:
    """What OpenMP keeps of processes, or of those that once had their ids."""
    return {(path.name, int(path.name.split("_")[-2])) for path in Path("/dev/shm").glob("__KMP_REGISTERED_LIB_*")}


class Heart:
    """Calls Health every 50 ms, each time on a new connection, while the block runs.

    Attributes:
        beats: answers so far.
        worst: seconds that the slowest took, and `worst_at`: when it came.
        failures: what went wrong, with the seconds since the start.

    """

    def __init__(self, backend: Backend, label: str, interval: float = 0.05) -> None:
        self._backend = backend
        self._label = label
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self.beats = 0
        self.worst = 0.0
        self.worst_at = datetime.datetime.now(datetime.UTC)
        self.failures: list[str] = []

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """No more calls; for a block that ends the server itself."""
        if self._done.is_set():
            return
        self._done.set()
        self._thread.join()
        print(
            f"health during {self._label}: {self.beats} answers, the slowest after {self.worst * 1000:.0f} ms"
            f" ({self.worst_at:%H:%M:%S}), {len(self.failures)} failures"
        )

    def check(self) -> None:
        """Every call was answered within the deadline of a probe."""
        assert self.beats > 0
        assert not self.failures

    def _beat(self) -> None:
        while not self._done.wait(self._interval):
            started = time.monotonic()
            try:
                reply = self._backend.call("Health", pb.HealthMessage(), timeout=PROBE_SECONDS)
            except grpc.RpcError as error:
                self.failures.append(f"{started - self._started:.1f} s: {error}")
                continue
            if reply.message != b"OK":
                self.failures.append(f"{started - self._started:.1f} s: {reply.message!r}")
            self.beats += 1
            if (seconds := time.monotonic() - started) > self.worst:
                self.worst, self.worst_at = seconds, datetime.datetime.now(datetime.UTC)


class Watch:
    """Asks for Status every 100 ms while the block runs, and keeps what it says.

    Attributes:
        seen: the answers, in order.
        failures: the errors.
        most_engines: how many EngineCore processes there were at most at a time.

    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.seen: list[pb.StatusResponse] = []
        self.failures: list[grpc.RpcError] = []
        self.most_engines = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(_POLL_SECONDS):
            self.most_engines = max(self.most_engines, len(self._backend.engine_cores()))
            try:
                self.seen.append(self._backend.status())
            except grpc.RpcError as error:
                self.failures.append(error)


@contextlib.contextmanager
def connect(addr: str, *, largest_message: int = _MESSAGE_BYTES) -> Iterator[pb_grpc.BackendStub]:
    """A stub on a connection of its own; `largest_message` (bytes, -1: no limit) holds both ways."""
    options = (
        ("grpc.max_send_message_length", largest_message),
        ("grpc.max_receive_message_length", largest_message),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # otherwise channels to one address share a connection
    )
    with grpc.insecure_channel(addr, options) as channel:
        yield pb_grpc.BackendStub(channel)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago, as Go's freeport finds one."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked every 100 ms; TimeoutError where there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(_POLL_SECONDS)


def name(process: psutil.Process) -> str:
    """How a process calls itself; empty when it is gone, or so far gone that its memory is."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
