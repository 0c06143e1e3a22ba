"""Two processes of ours that ask each other things over a socket pair: pickled calls, and their answers."""

import asyncio
import itertools
import logging
import pickle
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

Handler = Callable[..., Awaitable[Any]]

_LENGTH = struct.Struct("!Q")


class PeerError(Exception):
    """What was asked for failed at the other end; the text is its exception's."""


class PeerGone(PeerError):
    """The other end is closed, and its process gone or about to be."""


class Peer:
    """One end. What the other end asks is answered by `handlers`, by name, each call in a task of its own."""

    def __init__(self, connection: socket.socket, handlers: Mapping[str, Handler]) -> None:
        self._connection = connection
        self._handlers = handlers
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._is_gone = False

    async def open(self) -> None:
        """Take the socket over; before anything else."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._connection)

    async def run(self) -> None:
        """Read until the other end is closed; those who still wait for its answers hear PeerGone."""
        try:
            while True:
                kind, number, body = pickle.loads(await self._read())  # noqa: S301  # of our own
                if kind == "ask":
                    task = asyncio.create_task(self._answer(number, *body))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                elif (future := self._asked.get(number)) is not None and not future.done():
                    if kind == "answer":
                        future.set_result(body)
                    else:
                        future.set_exception(PeerError(body))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._is_gone = True
            self.close()
            for future in self._asked.values():
                if not future.done():
                    future.set_exception(PeerGone("the other process is gone"))

    async def ask(self, name: str, *arguments: Any) -> Any:
        """What the other end's handler of that name returns.

        Raises:
            PeerError: it raised; the text is that of its exception.
            PeerGone: there is nobody to answer.

        """
        if self._is_gone:
            raise PeerGone("the other process is gone")
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send("ask", number, (name, arguments))
            return await future
        finally:
            del self._asked[number]

    def close(self) -> None:
        """Close this end."""
        if self._writer is not None:
            self._writer.close()

    async def _answer(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        try:
            self._send("answer", number, await self._handlers[name](*arguments))
        except asyncio.CancelledError:
            self._send("failure", number, f"{name} was given up")
        except Exception as error:  # the other end's to judge
            logger.debug("%s failed", name, exc_info=True)
            self._send("failure", number, f"{type(error).__name__}: {error}")

    def _send(self, kind: str, number: int, body: Any) -> None:
        if self._writer is not None and not self._is_gone:
            data = pickle.dumps((kind, number, body))
            self._writer.write(_LENGTH.pack(len(data)) + data)

    async def _read(self) -> bytes:
        (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
        return await self._reader.readexactly(length)


def send_first(connection: socket.socket, what: Any) -> None:
    """Hand the other process what it is to be, before anybody asks anything; blocks."""
    data = pickle.dumps(what)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_first(connection: socket.socket) -> Any:
    """What `send_first` has sent; EOFError where there is nobody any more."""
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return pickle.loads(_exactly(connection, length))  # noqa: S301  # from the process that has started us


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return data
