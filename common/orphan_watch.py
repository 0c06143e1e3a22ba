"""Ends the engine's processes when the server is gone: vLLM's do not watch it, and keep all memory for good.

A process that the server has spawned runs `begin` before anything else (see `backend/entry.py`): from then on the
kernel kills it with its parent, whatever it is doing. `watch_server`, which also stands among vLLM's `general_plugins`
for processes that began otherwise, adds a thread that follows the server itself. Both work for processes of a server
that has announced itself, and nowhere else.
"""

import ctypes
import os
import select
import threading
from pathlib import Path

import psutil

# "<process id> <start time>" of the server, for the processes it starts.
VARIABLE = "BACKEND_SERVER_PROCESS"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SIGKILL = 9

_watched_by = 0


def announce() -> None:
    """Make the processes that this one starts from now on watch it."""
    os.environ[VARIABLE] = _identity(os.getpid())


def begin() -> None:
    """The first thing in a process spawned for the engine: follow the server, and leave its process group.

    The kernel's signal comes when the *thread* ends that spawned this process. Engines are spawned by a thread of the
    event loop's executor and workers by their engine's main thread, all of which end with their process. The group is
    left so that a SIGTERM to it drains the server, whose engine would otherwise abort its requests at once.
    """
    if not os.environ.get(VARIABLE):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
    watch_server()  # after the above: a server that died before it is noticed here
    os.setpgid(0, 0)


def watch_server() -> None:
    """Kill this process as soon as the server that announced itself is gone, be it before this call."""
    global _watched_by  # noqa: PLW0603  # once per process; a fork has no thread yet
    server = os.environ.get(VARIABLE, "")
    if not server or server == _identity(os.getpid()) or _watched_by == os.getpid():
        return
    try:
        descriptor = os.pidfd_open(int(server.split()[0]))
    except ProcessLookupError:
        descriptor = -1
    if descriptor < 0 or _identity(int(server.split()[0])) != server:
        psutil.Process().kill()
    _watched_by = os.getpid()
    threading.Thread(target=_wait, args=(descriptor,), name="orphan-watch", daemon=True).start()


def _wait(descriptor: int) -> None:
    end = select.poll()
    end.register(descriptor, select.POLLIN)
    end.poll()
    psutil.Process().kill()


def _identity(pid: int) -> str:
    """Process ids are used again; with the start time, in clock ticks since boot, they are not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # proc(5): the name stands in parentheses and may hold any; the start time is field 22.
    return f"{pid} {text.rpartition(')')[2].split()[19]}"
