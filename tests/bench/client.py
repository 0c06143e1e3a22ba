"""Many streams at once over raw sockets, in a process of its own: `python -m tests.bench.client`.

For each line of stdin, a `Job` in JSON, one line of stdout with what was seen (`tests.bench.observed.Observed`). What
it does for a message is the same few steps over HTTP/2 (gRPC) as over HTTP/1.1 (server-sent events), and far less than
a real client's: on a machine of few cores its time would otherwise be taken from the server that is measured.
"""

import contextlib
import dataclasses
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from tests.bench.observed import Observed, Stream, observed
from tests.fuzz import http2

_WINDOW = 2**31 - 1  # the largest: the server never waits for a WINDOW_UPDATE
_RECEIVE_BYTES = 1 << 18
_PATIENCE_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Job:
    """Streams that begin together.

    Attributes:
        protocol: "grpc", or "http".
        path: of the method, or of the URL.
        bodies: of the requests, in hex; one stream each.
        connections: how many they are spread over; HTTP/1.1 needs one for each.

    """

    protocol: str
    port: int
    path: str
    bodies: list[str]
    connections: int


class Connection(Protocol):
    """One connection and the streams on it."""

    socket: socket.socket
    sent: int
    streams: list[Stream]
    running: int

    def start(self, bodies: list[bytes]) -> None:
        """Send the requests."""
        ...

    def received(self, data: bytes, now: float) -> None:
        """Tell the streams what came for them."""
        ...


class Http2:
    """A connection of gRPC; without Huffman codes, tables and flow control on our side."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = _connected(port)
        self.sent = self.running = 0
        self.streams: list[Stream] = []
        self._rest = b""
        self._parts: dict[int, bytes] = {}
        self._headers = http2.block(http2.request_headers(path))
        # SETTINGS_HEADER_TABLE_SIZE 0, SETTINGS_INITIAL_WINDOW_SIZE, SETTINGS_MAX_FRAME_SIZE
        settings = b"\0\1\0\0\0\0" + b"\0\4" + _WINDOW.to_bytes(4, "big") + b"\0\5" + (2**20).to_bytes(4, "big")
        self._send(
            http2.PREFACE
            + http2.frame(http2.SETTINGS, payload=settings)
            + http2.frame(http2.WINDOW_UPDATE, payload=(_WINDOW - 65535).to_bytes(4, "big"))
        )
        self.socket.settimeout(_PATIENCE_SECONDS)
        while not self._rest.endswith(http2.frame(http2.SETTINGS, http2.ACK)):
            data = self.socket.recv(_RECEIVE_BYTES)
            if not data:
                raise ConnectionError("the server closed a connection")
            self._rest += data
        self._rest = b""
        self._send(http2.frame(http2.SETTINGS, http2.ACK))
        self.socket.setblocking(False)

    def start(self, bodies: list[bytes]) -> None:
        """See `Connection`."""
        frames = b""
        self.running = len(bodies)
        for body in bodies:
            stream = 2 * len(self.streams) + 1
            frames += http2.frame(http2.HEADERS, http2.END_HEADERS, stream, self._headers)
            frames += http2.frame(http2.DATA, http2.END_STREAM, stream, http2.message(body))
            self.streams.append(Stream())
        self._send(frames)

    def received(self, data: bytes, now: float) -> None:
        """See `Connection`."""
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if end - at < 9 + size:
                break
            kind, flags = data[at + 3], data[at + 4]
            if kind == http2.DATA:
                self._data(int.from_bytes(data[at + 5 : at + 9], "big"), data[at + 9 : at + 9 + size], now)
            elif kind == http2.HEADERS:
                if flags & http2.END_STREAM:
                    stream = self.streams[int.from_bytes(data[at + 5 : at + 9], "big") // 2]
                    if not stream.times:
                        raise ConnectionError(f"an answer without a message: {data[at + 9 : at + 9 + size]!r}")
                    stream.ended = now
                    self.running -= 1
            elif kind == http2.PING and not flags & http2.ACK:
                self._send(http2.frame(http2.PING, http2.ACK, payload=data[at + 9 : at + 9 + size]))
            elif kind in (http2.RST_STREAM, http2.GOAWAY):
                raise ConnectionError(f"frame {kind}: {data[at + 9 : at + 9 + size]!r}")
            at += 9 + size
        self._rest = data[at:]

    def _data(self, number: int, data: bytes, now: float) -> None:
        stream = self.streams[number // 2]
        if part := self._parts.pop(number, None):
            data = part + data
        at, end = 0, len(data)
        while end - at >= 5:
            size = int.from_bytes(data[at + 1 : at + 5], "big")
            if end - at < 5 + size:
                break
            stream.times.append(now)
            stream.last = data[at + 5 : at + 5 + size]
            at += 5 + size
        if at < end:
            self._parts[number] = data[at:]

    def _send(self, data: bytes) -> None:
        self.sent += len(data)
        self.socket.sendall(data)


class Http1:
    """A connection of HTTP/1.1 with one request, whose answer is server-sent events, or one body."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = _connected(port)
        self.socket.setblocking(False)
        self.sent = self.running = 0
        self.streams: list[Stream] = []
        self._path = path
        self._rest = b""
        self._events: bool | None = None

    def start(self, bodies: list[bytes]) -> None:
        """See `Connection`."""
        (body,) = bodies
        self.running = 1
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.streams.append(Stream())
        self.socket.sendall(head.encode() + body)
        self.sent += len(head) + len(body)

    def received(self, data: bytes, now: float) -> None:
        """See `Connection`."""
        stream = self.streams[0]
        self._rest += data
        if self._events is None:
            head, found, self._rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                self._rest = head
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"{head!r} {self._rest!r}")
            self._events = b"text/event-stream" in head
            self._length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if not self._events:
            if len(self._rest) >= self._length:
                stream.times.append(now)
                stream.last, stream.ended = self._rest, now
                self.running = 0
            return
        # Chunks of the transfer coding begin and end between events.
        *events, self._rest = self._rest.split(b"\n\n")
        for event in events:
            start = event.find(b"data: ") + 6
            if event.startswith(b"[DONE]", start):
                stream.ended = now
                self.running = 0
            else:
                stream.times.append(now)
                stream.last = event[start:]


def play(job: Job) -> Observed:
    """Begin all streams of a job at once, and see them through."""
    bodies = [bytes.fromhex(body) for body in job.bodies]
    connections = [connection(job.protocol, job.port, job.path) for _ in range(job.connections)]
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for each in connections:
            stack.enter_context(each.socket)
            selector.register(each.socket, selectors.EVENT_READ, each)
        cpu, started = time.process_time(), time.perf_counter()
        for number, each in enumerate(connections):
            each.start(bodies[number :: job.connections])
        received, left = 0, len(connections)
        while left:
            ready = selector.select(_PATIENCE_SECONDS)
            if not ready:
                raise TimeoutError(f"nothing came for {_PATIENCE_SECONDS:.0f} s")
            for key, _ in ready:
                asked: Connection = key.data
                data = asked.socket.recv(_RECEIVE_BYTES)
                received += len(data)
                if not data:
                    raise ConnectionError("the server closed a connection")
                asked.received(data, time.perf_counter())
                if not asked.running:
                    selector.unregister(asked.socket)
                    left -= 1
        return observed(
            [stream for each in connections for stream in each.streams],
            started,
            sent=sum(each.sent for each in connections),
            received=received,
            client_cpu=time.process_time() - cpu,
        )


def connection(protocol: str, port: int, path: str) -> Connection:
    """Open one."""
    return Http2(port, path) if protocol == "grpc" else Http1(port, path)


def _connected(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), _PATIENCE_SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def jobs() -> Iterator[Job]:
    """The jobs of stdin."""
    for line in sys.stdin:
        yield Job(**json.loads(line))


def main() -> None:
    """Play job after job until stdin ends; the answer to one that failed is why, a string."""
    for job in jobs():
        try:
            answer: Any = dataclasses.asdict(play(job))
        except OSError as error:  # of a connection, and a wait that was too long
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
