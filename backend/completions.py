"""How grpc.aio hears of what its core has completed, for less than it takes by itself.

A thread of grpc.aio's waits for the core, and writes a byte into a socket for each thing that is done, such as the
sending of a message. The event loop reads one byte, does all that is done by then, and wakes for nothing for each of
the other bytes. Here it reads them all at once, and from a pipe, which costs the kernel less. And the thread does not
take a processor from another one that is at work: else each message interrupts the loop that is about to send the next.
"""

import contextlib
import os
import socket
import threading

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # compiled, and not in the stubs

_MOST_BYTES = 1 << 16  # what a pipe holds

_installed = False


class _End:
    """One end of a pipe, where grpc.aio expects a socket."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Its number, which the thread writes to."""
        return self._descriptor

    def recv(self, _size: int) -> bytes:
        """All that has been written; what and how much it is does not matter to grpc.aio."""
        return os.read(self._descriptor, _MOST_BYTES)

    def setblocking(self, blocking: bool) -> None:
        """As a socket."""
        os.set_blocking(self._descriptor, blocking)

    def close(self) -> None:
        """As a socket."""
        os.close(self._descriptor)


def install() -> None:
    """Have grpc.aio hear so; call before its first server or channel of the process, for which all share one thread."""
    global _installed  # noqa: PLW0603  # as grpc.aio's own state
    if _installed:
        return
    _installed = True
    before = set(threading.enumerate())
    socketpair = socket.socketpair
    socket.socketpair = _pipe  # type: ignore[assignment]  # as much of a socket as grpc.aio uses
    try:
        cygrpc.init_grpc_aio()
    finally:
        socket.socketpair = socketpair
    for thread in set(threading.enumerate()) - before:
        if thread.native_id is not None:
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setscheduler(thread.native_id, os.SCHED_BATCH, os.sched_param(0))


def _pipe() -> tuple[_End, _End]:
    reading, writing = os.pipe()
    return _End(reading), _End(writing)
