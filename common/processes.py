"""The operating system's view of the engine: its processes, their memory, and their end."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from multiprocessing import resource_tracker

import psutil

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
# By what is there OpenMP (LLVM's, Intel's) tells its copies in a process apart; it removes it at a C program's own end.
_REGISTRATIONS = "/dev/shm"  # noqa: S108  # its choice
_REGISTRATION = re.compile(r"__KMP_REGISTERED_LIB_(?P<pid>\d{1,7})_(?P<user>\d{1,10})")
# How multiprocessing starts its tracker, behind `-c`.
_TRACKER = "from multiprocessing.resource_tracker import main"
# It begins to remove what was registered as soon as the last of its processes is gone.
_TRACKER_SECONDS = 5.0
# One takes a millisecond, and 20 where thousands of processes run.
_MOST_LOOKS = 10


# Children that are no engine's, by the name that they go by.
_apart: dict[str, psutil.Process] = {}


def set_apart(name: str, pid: int) -> None:
    """Count the child `pid` and what it starts as no engine's process."""
    _apart[name] = psutil.Process(pid)


def engine_processes() -> list[psutil.Process]:
    """The processes that vLLM has started under ours; Python's resource tracker is not among them."""
    return [child for child in _descendants() if is_resource_tracker(child) is False]


def _descendants() -> list[psutil.Process]:
    """All that run under ours but those set apart.

    One that ends during a look hides those it had started, which are ours from then on (see `adopt_orphans`): nobody of
    a look may be gone at the next one. A compiler's come and go all the time: then it is all who have been seen.
    """
    seen: set[psutil.Process] = set()
    former = _look()
    for _ in range(_MOST_LOOKS):
        found = _look()
        if set(former) <= set(found):
            return found
        seen.update(former)
        former = found
    return [*former, *(seen - set(former))]


def _look() -> list[psutil.Process]:
    try:
        children = psutil.Process().children(recursive=True)
    except psutil.Error:
        return []
    if _apart:
        others = {process.pid for process in _apart.values()}
        for child in children:  # parents come before theirs
            with contextlib.suppress(psutil.Error):
                if child.ppid() in others:
                    others.add(child.pid)
        children = [child for child in children if child.pid not in others]
    return children


def memory_by_process() -> dict[str, int]:
    """Resident bytes of this process (`server`), those set apart, and of each engine process, by name and id.

    Shared pages are counted in each; proportional sizes would take the kernel longer to compute than callers wait.
    """
    sizes = {"server": psutil.Process().memory_info().rss}
    for name, process in _apart.items():
        with contextlib.suppress(psutil.Error):
            sizes[f"{name} {process.pid}"] = process.memory_info().rss
    for process in engine_processes():
        with contextlib.suppress(psutil.Error):
            title = (process.cmdline() or [process.name()])[0].removeprefix("VLLM::")
            name = title if title.replace("_", "").isalnum() else "engine"
            sizes[f"{name} {process.pid}"] = process.memory_info().rss
    return sizes


def adopt_orphans() -> None:
    """Make this process the parent of workers whose engine process dies first, so that they stay in sight."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        logger.warning("prctl(PR_SET_CHILD_SUBREAPER): %s", os.strerror(ctypes.get_errno()))


def return_large_blocks() -> None:
    """Make the C library (glibc) return every block of 1 MiB and more when it is freed; call before threads start.

    It would learn from the first ones to keep them, in up to eight arenas per core: those for messages, 4 MiB each,
    made the server grow by tens of MiB over an hour, whenever another thread of gRPC's met its first large message.
    Two arenas fill up sooner than eight per core, and hold less; Python's lock lets few threads allocate at a time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
        mallopt(_M_ARENA_MAX, 2)


def keep_large_blocks() -> None:
    """Make the C library (glibc) keep blocks of up to 256 MiB for the next one; for a process that computes.

    A step makes and frees tensors of tens of MiB, such as the logits of 128 sequences. It depends on what happens to
    lie behind them whether glibc returns their pages by itself, and then the kernel clears the same 6,000 pages anew in
    every step: two thirds of the tokens were left, for minutes or for good.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Before 2.35 glibc knows no threshold above 32 MiB.
        if not mallopt(_M_MMAP_THRESHOLD, 2**28):
            mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def give_memory_back() -> None:
    """Return to the operating system what an engine's start or end has freed, where the C library can (glibc).

    What is left counts as made for good, as vLLM's own server has it: a full collection would else come only when a
    quarter as many objects again have been made, of 700,000, and stop the process to look at all of them. For so long
    would stay what calls leave behind in cycles, gRPC's own objects for each.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def leave_ray() -> None:
    """Disconnect from Ray, where vLLM has connected this process: what it has started there ends with that."""
    ray = sys.modules.get("ray")
    try:
        if ray is not None and ray.is_initialized():
            ray.shutdown()
    except Exception:
        logger.warning("Ray: this process could not disconnect", exc_info=True)


def has_ended(process: psutil.Process) -> bool:
    """Whether it has, be it that its parent has not asked for its status."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL what still runs of `processes`, and wait until it is gone; OpenMP leaves nothing in /dev/shm then."""
    alive = [process for process in processes if process.is_running()]
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if alive:
        await asyncio.to_thread(_reap, alive)
    remove_registrations()


def remove_registrations(ended: Iterable[int] = ()) -> None:
    """Remove what OpenMP keeps in /dev/shm of processes that can't do so themselves any more.

    Those are all of this user's that are gone: vLLM kills some, too, and waits for them before anybody else sees that,
    and those of a server that was killed had nobody left. And those that have `ended` without its knowing, or are about
    to. Time says nothing here: a clock may have been set since.
    """
    ids = set(ended)
    with contextlib.suppress(OSError), os.scandir(_REGISTRATIONS) as entries:
        for entry in entries:
            registration = _REGISTRATION.fullmatch(entry.name)
            if registration is None or int(registration["user"]) != os.getuid():
                continue
            pid = int(registration["pid"])
            with contextlib.suppress(OSError):
                if pid in ids or _is_gone(pid):
                    os.unlink(entry.path)


def _is_gone(pid: int) -> bool:
    """Whether no process with this id runs; a thread may have it by now."""
    try:
        return not psutil.pid_exists(pid) or has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:  # such as another user's, which nothing may be asked of
        return False


async def outlive_trackers() -> None:
    """Wait until the resource trackers of processes that are gone have removed what those left, and are gone too.

    Shared memory and semaphores stay for good where a tracker is killed first. One that doesn't end is killed.
    """
    ours = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]  # typeshed does not know
    trackers = [child for child in _descendants() if child.pid != ours and is_resource_tracker(child)]
    _, left = await asyncio.to_thread(psutil.wait_procs, trackers, timeout=_TRACKER_SECONDS)
    if left:
        logger.warning("processes: the resource tracker did not end: killed; shared memory may be left in /dev/shm")
        await kill(left)


def _reap(killed: list[psutil.Process]) -> None:
    ids = {process.pid for process in killed}
    for child in multiprocessing.active_children():
        if child.pid in ids:
            # Reaped by anybody else it would count as alive, and its two pipes would stay open for good.
            child.join(timeout=5)
    psutil.wait_procs(killed, timeout=5)


def is_resource_tracker(process: psutil.Process) -> bool | None:
    """Whether it removes what Python's processes have shared, once the last is gone; None where this one is."""
    try:
        return any(word.startswith(_TRACKER) for word in process.cmdline())
    except psutil.Error:
        return None
