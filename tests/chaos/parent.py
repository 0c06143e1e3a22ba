"""A parent that respawns: spawns the server, asks for Health, loads the model, and starts over when it has exited."""

import asyncio
import contextlib
import json
import time
from pathlib import Path

import grpc

from common.pb import backend_pb2 as pb
from tests.chaos.record import Record
from tests.process.orchestrator import DEATH_SECONDS, Backend, eventually, name
from tests.process.wire import PARSERS, model_options

GONE_SECONDS = 5.0
_PATIENCE = 60.0
_LOOK_SECONDS = 0.1
_KEPT_LOG = 20_000
# How the log calls what was answered with INTERNAL.
_OF_A_BUG = "internal error"
CONTEXTS = (4096, 2048)


class Parent:
    """The server of the moment, and how it got there.

    Attributes:
        backend: the server; None between the end of one and the start of the next.
        ready: set while a model is loaded, as far as the parent knows.
        life: how many servers there have been.
        context: the context length that the model is loaded with.
        worker_apart: whether it is loaded into an engine with a worker process, which one on a CPU has not.
        last_words: what a server has written around a bug, or else the end of what the latest to end had written.

    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._record = record
        self.backend: Backend | None = None
        self.ready = asyncio.Event()
        self.life = 0
        self.context = CONTEXTS[0]
        self.worker_apart = False
        self.last_words = ""
        self._stopping = False
        self.expected_exits: set[int] = set()
        """Exit statuses that what was done just now may lead to; no process may end otherwise."""

    def options(self) -> pb.ModelOptions:
        """LoadModel's request as it is now."""
        arguments = json.dumps({"distributed_executor_backend": "mp"} if self.worker_apart else {})
        return model_options(self._folder, *PARSERS, MaxModelLen=self.context, EngineArgs=arguments)

    async def run(self) -> None:
        """Respawn until `stop`."""
        while not self._stopping:
            await self._live()

    async def stop(self) -> None:
        """End the server as the orchestrator does, and respawn no more."""
        self._stopping = True
        backend = self.backend
        if backend is not None and backend.exit_status is None:
            stop = await asyncio.to_thread(backend.stop)
            if (stop.status, stop.killed) != (0, False):
                self._record.violation(f"the last stop: {stop}")

    async def load(self) -> None:
        """LoadModel, as at a start; a failure is a violation unless the server is gone."""
        backend = self.backend
        assert backend is not None
        try:
            result = await asyncio.to_thread(backend.load, self.options())
        except grpc.RpcError as error:
            if backend.exit_status is None:
                # The end of a process that was told to end, or whose engine died, is near.
                with contextlib.suppress(TimeoutError):
                    await asyncio.to_thread(lambda: eventually(lambda: backend.exit_status is not None, 15, "its end"))
            if backend.exit_status is None:
                self._record.violation(f"LoadModel: {error}")
            return
        if not result.success:
            self._record.violation(f"LoadModel: {result.message}")
            return
        engines = await asyncio.to_thread(backend.engine_cores)
        if len(engines) != 1 and backend.exit_status is None:
            self._record.violation(f"after LoadModel there are {len(engines)} engine processes")
        self.ready.set()

    async def _live(self) -> None:
        self.life += 1
        backend = Backend()
        backend.__enter__()
        try:
            self.backend = backend
            await asyncio.to_thread(backend.wait_for_health, DEATH_SECONDS)
            await self.load()
            while backend.exit_status is None:  # noqa: ASYNC110  # another process has no event to set
                await asyncio.sleep(_LOOK_SECONDS)
        except AssertionError as error:
            # Killed before it was healthy, or it never became so.
            if backend.exit_status is None:
                self._record.violation(f"spawn: {error}")
        finally:
            self.ready.clear()
            await asyncio.to_thread(self._bury, backend)
            self.backend = None

    def _bury(self, backend: Backend) -> None:
        status = backend.exit_status
        self.last_words = kept(backend.stderr, self.last_words)
        if status is not None and not self._stopping and status not in self.expected_exits:
            self._record.violation(f"exit status {status}, {self.expected_exits} expected: {backend.last_stderr_line}")
        started = time.monotonic()
        try:
            eventually(lambda: not backend.processes(), GONE_SECONDS, "all gone")
        except TimeoutError:
            left = [name(process) for process in backend.processes()]
            self._record.violation(f"exit status {status}; {time.monotonic() - started:.0f} s later are left: {left}")
        with contextlib.suppress(AssertionError):  # told above
            backend.__exit__(None, None, None)

    async def wait_until_ready(self) -> None:
        """Wait for a model; TimeoutError where none comes."""
        await asyncio.wait_for(self.ready.wait(), _PATIENCE)


def kept(log: str, before: str) -> str:
    """Of the log of a server that has ended, what is worth more than `before`, which others have left; or that."""
    bug = log.find(_OF_A_BUG)
    if bug >= 0:
        return log[max(bug - _KEPT_LOG // 2, 0) : bug + _KEPT_LOG // 2]
    return before if _OF_A_BUG in before else log[-_KEPT_LOG:]
