"""Ends the process when its parent is gone: nobody would talk to it any more, and nobody would stop it."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from backend.settings import PARENT_WATCH
from common import private_folders
from common.processes import engine_processes, remove_registrations

logger = logging.getLogger(__name__)

# What the ordinary end gets; two seconds of the interval before it, all is over within five.
PATIENCE = 2.5


def watch_parent(parent: int, interval: float, stop: Callable[[str], None]) -> None:
    """Look every `interval` seconds whether `parent` still is; if not, call `stop(cause)`, and see that we end.

    `parent` is what `os.getppid` said at the start. A thread, because the event loop may be what hangs; `stop` is
    called in it. Does nothing for a process that init or nobody has started.
    """
    if parent <= 1:
        return

    def watch() -> None:
        # An orphan gets another parent: init, or who has taken its place.
        while os.getppid() == parent:
            time.sleep(interval)
        cause = f"the parent process {parent} is gone, and {PARENT_WATCH}=off is not set"
        with contextlib.suppress(RuntimeError):  # the loop has ended: so does the process
            stop(cause)
        time.sleep(PATIENCE)
        _die(cause)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _die(cause: str) -> None:
    engines = engine_processes()
    for process in engines:
        with contextlib.suppress(Exception):
            process.kill()
    # Nobody may be reading stderr, and a write that blocks must not keep us.
    words = threading.Thread(
        target=_say, args=(f"backend: {cause}, and the server did not end by itself\n",), daemon=True
    )
    words.start()
    words.join(0.5)
    private_folders.remove_all()
    remove_registrations([os.getpid(), *(process.pid for process in engines)])
    os._exit(1)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()
