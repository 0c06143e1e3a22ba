"""A process that imports vLLM while the server does, and becomes the first engine's.

An engine's process is a Python of its own, and would spend the better part of a load importing what the server has
imported before. So one is started with the server, where there is a second core; the first load hands it what
multiprocessing would have handed to a fresh one. Variables that are read when a process starts must be those that the
engine wants, which is known beforehand for a CPU engine in one process with the defaults. Any other gets a process of
its own, as from vLLM itself.
"""

import contextlib
import gc
import glob
import importlib
import importlib.util
import io
import logging
import math
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from typing import Any

from common import cgroup, cpu_threads, orphan_watch
from common.processes import remove_registrations
from common.vllm_env import is_for_cpus

logger = logging.getLogger(__name__)

# What an engine's process needs of vLLM, whatever the model.
_MODULES = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "common.one_process")
# With one, two imports at a time take as long as one after the other.
_LEAST_CORES = 2
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
        tracker = _tracker()
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
        """Kill it, if it still runs."""
        self._process.kill()
        self._process.wait()
        remove_registrations()
        self._calls.close()
        os.close(self.sentinel)
        os.close(self.data)


def start() -> None:
    """Start the process, where one can be of use; call in the main thread, with whose end it ends."""
    global _spare  # noqa: PLW0603  # one per process
    try:
        environment = _expected()
        if _spare is None and environment is not None:
            orphan_watch.announce()
            _spare = _Spare(environment | {orphan_watch.VARIABLE: os.environ[orphan_watch.VARIABLE]})
    except Exception as error:  # noqa: BLE001  # a load can do without
        logger.warning("no process is started for the first engine: %s", error)


def waiting() -> int | None:
    """The process's id, while it waits."""
    return None if _spare is None else _spare.pid


@contextlib.contextmanager
def moving_in(*, suits: bool) -> Iterator[None]:
    """A context in which vLLM starts its engine's process; a load that fails before that leaves the spare waiting.

    `suits` says whether the engine is one process, as the spare is meant for; otherwise it ends here.
    """
    from vllm.v1.engine import utils

    if not suits and (spare := _take()):
        _refuse(spare, "the engine has several processes")
    get_mp_context = utils.get_mp_context
    if _spare is not None:
        utils.get_mp_context = _Context
    try:
        yield
    finally:
        utils.get_mp_context = get_mp_context


def main(calls: int, tracker: int, data: int) -> None:
    """Run in the spare process: import vLLM, wait for the call, and become what multiprocessing has started."""
    orphan_watch.begin()
    resource_tracker._resource_tracker._fd = tracker  # type: ignore[attr-defined]  # as `spawn_main` does, too late
    with contextlib.suppress(Exception):  # the engine's own import says what is wrong
        from setproctitle import setproctitle  # vLLM's

        setproctitle("VLLM::Spare")
        _import_all()
    with socket.socket(fileno=calls) as connection:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if not descriptors:
            sys.exit()  # the server is gone
        os.dup2(descriptors[0], 2)
        os.close(descriptors[0])
        environment = pickle.load(connection.makefile("rb"))  # noqa: S301  # from the server that has started us
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    spawn.spawn_main(data, tracker_fd=tracker)


def _import_all() -> None:
    """Import what an engine needs, and count it as made for good.

    Else the collector would look through all modules so far, again and again, for a seventh of the time. What it would
    have found, 17 MB, stays.
    """
    gc.disable()
    try:
        for name in _MODULES:
            importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _tracker() -> int:
    """The descriptor of the process by which multiprocessing removes what killed processes leave.

    It is started here, with our stderr, and would warn there of what it finds when we have ended with our last line.
    """
    name = "PYTHONWARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "ignore"
    try:
        return resource_tracker.getfd() or 0  # it never has none; typeshed does not know
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _refuse(spare: _Spare, why: str) -> None:
    logger.info("load: the spare process can't become the engine's: %s", why)
    spare.end()


def _take() -> "_Spare | None":
    global _spare  # one per process
    spare, _spare = _spare, None
    return spare


def _expected() -> dict[str, str] | None:
    """The environment of the process that a load with the defaults starts; None where that is not known.

    See `one_process.thread_settings`, which is vLLM's `OMPProcessManager`, `engine_config.compile_nothing`, and vLLM's
    `CpuPlatform.check_and_update_config`.
    """
    cores = min(len(os.sched_getaffinity(0)), cgroup.processors() or math.inf)
    if not is_for_cpus() or cores < _LEAST_CORES:
        return None
    cpu_threads.bind(0)
    environment = {"TORCHDYNAMO_DISABLE": "1"} | os.environ
    preloaded = environment.get("LD_PRELOAD", "")
    if not any(name in preloaded for name in ("libgomp", "libiomp", "libomp")):
        bundled = _files("torch", "../torch.libs/libgomp*.so*", "lib/libgomp*.so*")
        if not bundled:
            return None
        preloaded = f"{preloaded}:{bundled[0]}" if preloaded else bundled[0]
    if "libtcmalloc" not in preloaded:
        bundled = _files("vllm", "libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*")
        preloaded = f"{bundled[0]}:{preloaded}" if bundled else preloaded
    environment["LD_PRELOAD"] = preloaded
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


def _files(package: str, *patterns: str) -> list[str]:
    """Files in or beside a package's folder, which is not imported; in the order in which vLLM finds them."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return []
    folder = os.path.dirname(spec.origin)
    return [os.path.normpath(path) for pattern in patterns for path in glob.glob(os.path.join(folder, pattern))]


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
        if wrong or self._fds or not spare.give(os.environ):
            _refuse(spare, ", ".join(wrong) or ("descriptors are inherited" if self._fds else "it is gone"))
            self._fds = []
            super()._launch(process)
            return
        self.pid, self.sentinel = spare.pid, spare.sentinel
        self.finalizer = util.Finalize(self, _close, (spare.sentinel, spare.data))
        with open(spare.data, "wb", closefd=False) as pipe:
            pipe.write(message.getbuffer())


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _Process(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:  # noqa: N802  # multiprocessing's name
        return _Popen(process_obj)


class _Context(context.SpawnContext):
    Process = _Process
