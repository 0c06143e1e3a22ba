"""Keeps alive the memory into which gRPC's core writes the next call, whatever becomes of the loop that waits for it.

grpc.aio's accepting loop waits in one task for each method, whose frame owns that memory (`RPCState`). When the loop
fails, by a request whose path is no UTF-8, it cancels them, and the memory is freed under the core: the next call, or
the end of that server, overwrites what Python has put there since, and the process crashes. So these tasks are not
cancelled here: they end when the core says that it is done with them.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, cast

_WAITS_FOR_A_CALL = ("_request_call", "_request_registered_call")

_waiting: set["asyncio.Task[Any]"] = set()


def keep_call_slots(loop: asyncio.AbstractEventLoop) -> None:
    """Have `loop` make its tasks so; before a server is started in it."""
    # What it gives for some is a future, which is all that grpc.aio takes them for.
    loop.set_task_factory(cast("Any", _task))


def _task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Future[Any]":
    task = asyncio.Task(coro, loop=loop, **options)
    if getattr(coro, "__name__", "") not in _WAITS_FOR_A_CALL:
        return task
    # The loop holds tasks weakly, and the one who is handed the shield may let go of it.
    _waiting.add(task)
    task.add_done_callback(_waiting.discard)
    return asyncio.shield(task)
