"""The end of the process: requests in flight finish, the engine goes, then we do, all in the orchestrator's patience.

The orchestrator kills 15 s after its SIGTERM. By default the requests get 5 s of them, the engine 6, and killing what
is left after that at most 3.5.
"""

import asyncio
import contextlib
import logging
import os
import sys
from typing import NoReturn

import grpc

from backend.ending import Ending
from backend.lifecycle import Lifecycle
from common import private_folders
from common.frontends import ALONE, Frontends
from common.processes import engine_processes, kill, remove_registrations

logger = logging.getLogger(__name__)

# What killing an engine that won't shut down may take on top of its own timeout.
KILL_SECONDS = 1.5
# The last answers get this long to reach clients who read slowly.
FLUSH_SECONDS = 0.5


async def shut_down(
    lifecycle: Lifecycle,
    ending: Ending,
    server: grpc.aio.Server,
    *,
    drain_seconds: float,
    shutdown_timeout: float,
    frontends: Frontends = ALONE,
) -> None:
    """Refuse what is new, wait for what is in flight, end the engine and its processes, then the server.

    The port stays open until then, for probes and so that a refusal says why. A hurry ends each wait.
    """
    lifecycle.drain()
    idle = asyncio.create_task(lifecycle.idle())
    await ending.wait(idle, drain_seconds)
    idle.cancel()
    # A load that hangs in a download has no processes to kill, and its thread can't be stopped.
    patience = shutdown_timeout if lifecycle.has_model else 0.0
    freeing = asyncio.create_task(lifecycle.free())
    await ending.wait(freeing, patience + KILL_SECONDS)
    if not freeing.done():
        await kill(engine_processes())
        await asyncio.wait([freeing], timeout=KILL_SECONDS)
    await asyncio.gather(server.stop(FLUSH_SECONDS), frontends.stop(FLUSH_SECONDS))
    await kill(engine_processes())


def leave(status: int, message: str | None) -> NoReturn:
    """Leave at once. The message is the last line on stderr, where the orchestrator looks for the cause."""
    # A parent that is gone may have taken the other end of our pipes along.
    with contextlib.suppress(OSError, ValueError):
        if message:
            sys.stderr.write(f"backend: {' '.join(message.split())}\n")
        sys.stderr.flush()
        sys.stdout.flush()
    private_folders.remove_all()
    remove_registrations([os.getpid()])
    # Threads inside vLLM's import or start would hold up a normal exit.
    os._exit(status)
