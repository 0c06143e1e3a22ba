"""A wire that is cut: a TCP relay to a server, which resets both connections after so many bytes of answers."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

_PIECE = 4096


@contextlib.asynccontextmanager
async def cutter(addr: str, most: int) -> AsyncIterator[str]:
    """The address of a relay to `addr` (HOST:PORT) for one connection, cut after `most` bytes from the server."""
    host, _, port = addr.rpartition(":")
    tasks: set[asyncio.Task[None]] = set()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            tasks.add(task)
        onward = None
        try:
            onward = await asyncio.open_connection(host, int(port))
            asking = asyncio.create_task(_pump(reader, onward[1], None))
            try:
                await _pump(onward[0], writer, most)
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the server is gone, or the client; asyncio reports a handler that is cancelled as a failure
        finally:
            for end in (writer, onward[1] if onward else None):
                if end is not None:
                    _reset(end)

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None) -> None:
    passed = 0
    while data := await reader.read(_PIECE):
        passed += len(data)
        if most is not None and passed > most:
            return
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Without a farewell: RST instead of FIN."""
    with contextlib.suppress(OSError):
        plug = writer.get_extra_info("socket")
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
