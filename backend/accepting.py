"""How calls are taken from gRPC's core, where grpc.aio's own way can be ended, or crashed, by any caller.

In its accepting loop grpc.aio decodes the path of each call of a method that nobody has registered. One that is no
UTF-8 ends the loop, the port is closed, and the memory into which the core writes the next call of each method
(`RPCState`, which the frame of a waiting task owns) is freed under it. Here such calls never reach that loop: every
method of ours is registered, so that they are answered without a look at their path. And the tasks that wait are not
cancelled with those who wait for them: they end when the core says that it is done with them.
"""

import asyncio
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, and not in the stubs

# The path of a call of a method that is not known: its own can't be asked for without decoding it.
UNKNOWN_PATH = ""

# The loop holds tasks weakly, and who is handed a shield may let go of it.
_held: set["asyncio.Future[Any]"] = set()


class AcceptingServer(cygrpc.AioServer):  # type: ignore[misc]  # of a compiled module, without types
    """grpc.aio's server, but for how it waits for calls."""

    def __init__(self, loop: Any, thread_pool: Any, handlers: Any, interceptors: Any, *others: Any) -> None:
        super().__init__(loop, thread_pool, handlers, interceptors, *others)
        self._asked_first = tuple(interceptors or ())
        self._knows_nothing = cygrpc._MethodResolver([], {})

    def _make_request_call_future(self, method: bytes | None) -> "asyncio.Future[Any]":
        """What gRPC's loop waits for: the next call of this method; None: of one that is not registered."""
        if method is None:
            return asyncio.create_task(self._refuse())
        return self._next_call(method)

    async def _refuse(self) -> None:
        """Answer calls of unknown methods, until the server stops; interceptors see them as any other call."""
        while True:
            call = await self._next_call(None)
            answer = cygrpc._handle_rpc(
                UNKNOWN_PATH, self._knows_nothing, self._asked_first, call, asyncio.get_running_loop(), False
            )
            _hold(
                asyncio.create_task(
                    cygrpc._schedule_rpc_coro(answer, call, asyncio.get_running_loop(), "an unknown method")
                )
            )

    def _next_call(self, method: bytes | None) -> "asyncio.Future[Any]":
        return asyncio.shield(_hold(super()._make_request_call_future(method)))


def install() -> None:
    """Have `grpc.aio.server` make servers that accept so."""
    cygrpc.AioServer = AcceptingServer


def _hold(task: "asyncio.Task[Any]") -> "asyncio.Task[Any]":
    _held.add(task)
    task.add_done_callback(_held.discard)
    return task
