"""A process that imports vLLM while the server does, and becomes the first engine's.

An engine's process is a Python of its own, and would spend the better part of a load importing what the server has
imported before. So one is started with the server, on the second core; the first load hands it what multiprocessing
would have handed to a fresh one. Variables that are read when a process starts must be those that the engine wants,
which is known beforehand for a CPU engine in one process with the defaults. Any other gets a process of its own, as
from vLLM itself.
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from pathlib import Path
from typing import Any

import setproctitle

from common import cpu_threads, orphan_watch
from common.vllm_env import is_for_cpus

logger = logging.getLogger(__name__)

# What an engine's process needs of vLLM, whatever the model.
_MODULES = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "common.one_process")
# Variables that vLLM reads when it is to do what they say, and those that importing it sets anyway.
_LATE_PREFIX = "VLLM_"
_LATE = frozenset(
    {
        "AITER_SITUV2_A4W4",
        "LD_LIBRARY_PATH",
        "LOCAL_WORLD_SIZE",
        "NUMEXPR_MAX_THREADS",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "TILELANG_CLEANUP_TEMP_FILES",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCHINDUCTOR_COMPILE_THREADS",
        "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
        "TRITON_CACHE_AUTOTUNING",
    }
)

_spare: "_Spare | None" = None


class _Spare:
    """The process, and our ends of what leads to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self._calls, its_calls = socket.socketpair()
        # As multiprocessing has them: one tells us of its end and one tells it of ours, with all that it is to run.
        self.sentinel, its_end = os.pipe()
        its_data, self.data = os.pipe()
        tracker = resource_tracker.getfd() or 0  # it never has none; typeshed does not know
        program = f"from common.spare import main; main({its_calls.fileno()}, {tracker}, {its_data})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, "--multiprocessing-fork"],
            env=environment,
            pass_fds=[its_calls.fileno(), tracker, its_data, its_end],
        )
        self.pid = self._process.pid
        its_calls.close()
        os.close(its_data)
        os.close(its_end)

    def give(self, environment: Mapping[str, str]) -> bool:
        """Hand it the environment, and the present stderr in place of its own; False where it is gone."""
        with self._calls, contextlib.suppress(OSError):
            socket.send_fds(self._calls, [b"2"], [2])
            self._calls.sendall(pickle.dumps(dict(environment)))
            self._calls.shutdown(socket.SHUT_WR)
            if self._process.poll() is None:
                self._process.returncode = 0  # multiprocessing waits for it from now on
                return True
        return False

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()
        self._calls.close()
        os.close(self.sentinel)
        os.close(self.data)


def start() -> None:
    """Start the process, where one can be of use; call in the main thread, with whose end it ends."""
    global _spare  # noqa: PLW0603  # one per process
    environment = _expected()
    if _spare is None and environment is not None:
        orphan_watch.announce()
        _spare = _Spare(environment | {orphan_watch.VARIABLE: os.environ[orphan_watch.VARIABLE]})


@contextlib.contextmanager
def moving_in() -> Iterator[None]:
    """A context in which vLLM starts its engine's process; a spare that can't become it ends here."""
    from vllm.v1.engine import utils

    get_mp_context, utils.get_mp_context = utils.get_mp_context, _Context
    try:
        yield
    finally:
        utils.get_mp_context = get_mp_context
        if spare := _take():
            spare.end()


def main(calls: int, tracker: int, data: int) -> None:
    """Run in the spare process: import vLLM, wait for the call, and become what multiprocessing has started."""
    orphan_watch.begin()
    setproctitle.setproctitle("VLLM::Spare")
    with contextlib.suppress(Exception):  # the engine's own import says what is wrong
        for name in _MODULES:
            importlib.import_module(name)
    with socket.socket(fileno=calls) as connection:
        _, (stderr,), _, _ = socket.recv_fds(connection, 1, 1)
        os.dup2(stderr, 2)
        os.close(stderr)
        environment = pickle.load(connection.makefile("rb"))  # noqa: S301  # from the server that has started us
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    spawn.spawn_main(data, tracker_fd=tracker)


def _take() -> "_Spare | None":
    global _spare  # one per process
    spare, _spare = _spare, None
    return spare


def _expected() -> dict[str, str] | None:
    """The environment of the process that a load with the defaults starts; None where that is not known.

    See `one_process.thread_settings`, which is vLLM's `OMPProcessManager`, `engine_config.compile_nothing`, and vLLM's
    `CpuPlatform.check_and_update_config`.
    """
    torch = importlib.util.find_spec("torch")
    if not is_for_cpus() or torch is None or not torch.origin:
        return None
    cpu_threads.bind(0)
    environment = {"TORCHDYNAMO_DISABLE": "1"} | os.environ
    preloaded = environment.get("LD_PRELOAD", "")
    if not any(name in preloaded for name in ("libgomp", "libiomp", "libomp")):
        bundled = sorted(Path(torch.origin).parent.glob("lib/libgomp*.so*"))
        if not bundled:
            return None
        preloaded = environment["LD_PRELOAD"] = f"{preloaded}:{bundled[0]}" if preloaded else str(bundled[0])
    cpus = environment[cpu_threads.VARIABLE]
    if cpus == "nobind":
        return environment
    numbers = cpus.split(",")
    if not all(number.isdecimal() for number in numbers):
        return None
    if "libgomp" in preloaded:
        environment["GOMP_CPU_AFFINITY"] = " ".join(numbers)
    else:
        environment["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{cpus}]"
        environment |= {"KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    environment["OMP_NUM_THREADS"] = str(len(numbers))
    return environment


def _differences(given: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The variables that a process started with those `given` can't take over any more."""
    return sorted(
        name
        for name in given.keys() | wanted.keys()
        if given.get(name) != wanted.get(name) and name not in _LATE and not name.startswith(_LATE_PREFIX)
    )


_Spawning: Any = popen_spawn_posix.Popen  # typeshed lacks what it consists of


class _Popen(_Spawning):  # type: ignore[misc]  # as above
    """multiprocessing's own, but for the first process that the spare can become."""

    _fds: list[int]

    def _launch(self, process: Any) -> None:
        spare = _take()
        if spare is None:
            super()._launch(process)
            return
        message = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process.name), message)
            reduction.dump(process, message)
        finally:
            context.set_spawning_popen(None)
        wrong = _differences(spare.environment, os.environ)
        # Descriptors are inherited, and the spare has been born.
        if wrong or self._fds or not spare.give(os.environ):
            logger.info("load: the spare process can't become the engine's: %s", ", ".join(wrong) or "it is gone")
            spare.end()
            self._fds = []
            super()._launch(process)
            return
        self.pid, self.sentinel = spare.pid, spare.sentinel
        with open(spare.data, "wb", closefd=False) as pipe:
            pipe.write(message.getbuffer())
        self.finalizer = util.Finalize(self, _close, (spare.sentinel, spare.data))


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:  # noqa: N802  # multiprocessing's name
        return _Popen(process_obj)


class _Context(context.SpawnContext):
    Process = _Process
