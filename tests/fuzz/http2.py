"""Frames of HTTP/2 (RFC 9113) and header blocks (RFC 7541), as few as an RPC needs, and as wrong as one likes."""

import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20

Headers = list[tuple[bytes, bytes]]


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """A frame; `length` lies about its payload."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + struct.pack(">BBI", kind & 255, flags & 255, stream) + payload


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """HPACK's integer with a prefix of `bits` bits, the others of its first byte from `first`."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([first | value])
    out = bytearray([first | most])
    value -= most
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block of literals without indexing, names and values as they are."""
    return b"".join(b"\0" + integer(len(name), 7) + name + integer(len(value), 7) + value for name, value in headers)


def request_headers(method: str, **more: str) -> Headers:
    """What a gRPC client sends before its message."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", method.encode(errors="surrogateescape")),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *((name.replace("_", "-").encode(), value.encode()) for name, value in more.items()),
    ]


def message(data: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC frames it."""
    return struct.pack(">BI", compressed, (len(data) if length is None else length) & 0xFFFFFFFF) + data


def frames_of(method: str, request: bytes, stream: int = 1, *, preface: bool = True) -> list[bytes]:
    """An RPC that is all right, one element for each thing that a client writes."""
    opening = [PREFACE, frame(SETTINGS), frame(SETTINGS, ACK)] if preface else []
    return [
        *opening,
        frame(HEADERS, END_HEADERS, stream, block(request_headers(method))),
        frame(DATA, END_STREAM, stream, message(request)),
    ]
