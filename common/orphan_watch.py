"""Ends the engine's processes when the server is gone: vLLM's do not watch it, and keep all memory for good.

The function `watch_server` is an entry point of vLLM's `general_plugins`, which every engine process calls while it
starts. It works for processes of a server that has announced itself, and nowhere else.
"""

import os
import select
import threading
from pathlib import Path

import psutil

# "<process id> <start time>" of the server, for the processes it starts.
VARIABLE = "BACKEND_SERVER_PROCESS"


def announce() -> None:
    """Make the processes that this one starts from now on watch it."""
    os.environ[VARIABLE] = _identity(os.getpid())


def watch_server() -> None:
    """Kill this process as soon as the server that announced itself is gone, be it before this call."""
    server = os.environ.get(VARIABLE, "")
    if not server or server == _identity(os.getpid()):
        return
    try:
        descriptor = os.pidfd_open(int(server.split()[0]))
    except ProcessLookupError:
        descriptor = -1
    if descriptor < 0 or _identity(int(server.split()[0])) != server:
        psutil.Process().kill()
    threading.Thread(target=_wait, args=(descriptor,), name="orphan-watch", daemon=True).start()


def _wait(descriptor: int) -> None:
    select.select([descriptor], [], [])
    psutil.Process().kill()


def _identity(pid: int) -> str:
    """Process ids are used again; with the start time, in clock ticks since boot, they are not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # proc(5): the name stands in parentheses and may hold any; the start time is field 22.
    return f"{pid} {text.rpartition(')')[2].split()[19]}"
