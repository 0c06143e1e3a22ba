"""Cases for the port itself: bytes that are no gRPC at all, and gRPC whose frames are wrong."""

import gzip
import random
import struct
from collections.abc import Callable

from tests.fuzz import http2
from tests.fuzz.cases import Wire
from tests.fuzz.http2 import block, frame, frames_of, message, request_headers

# RPCs whose valid requests end at once; a model answers some of them.
_TARGETS = (
    ("/backend.Backend/Health", b""),
    ("/backend.Backend/Status", b""),
    ("/backend.Backend/TokenizeString", b"\x0a\x05hello"),
    ("/backend.Backend/Detokenize", b"\x0a\x03\x01\x02\x03"),
    ("/backend.Backend/Predict", b"\x0a\x09The quick\x20\x02"),
    ("/backend.Backend/PredictStream", b"\x0a\x09The quick\x20\x02"),
    ("/grpc.health.v1.Health/Check", b""),
    ("/backend.Backend/Nothing", b""),
)
_ENDS = ("close", "close", "half", "reset")
_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(range(32)) + bytes.fromhex("20") + bytes(150)
_HTTP1 = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /backend.Backend/Health HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n",
    b"CONNECT localhost:1 HTTP/1.1\r\n\r\n",
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\x05\x01\x00",
    b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n",
)
_SMALL_BOMB = gzip.compress(bytes(1 << 20))
_FLOOD = 1000


def garbage(draw: random.Random) -> Wire:
    """Bytes that begin no connection of HTTP/2, or only just."""
    kind = draw.randrange(8)
    if kind == 0:
        data = draw.randbytes(draw.choice((0, 1, 2, 9, 24, 100, 1000, 70_000)))
    elif kind == 1:
        data = _flipped(draw, _HELLO)[: draw.choice((1, 5, 6, 11, 60, 205))]
    elif kind == 2:
        data = _flipped(draw, draw.choice(_HTTP1)) if draw.random() < 0.5 else draw.choice(_HTTP1)
    elif kind == 3:
        data = http2.PREFACE[: draw.randrange(len(http2.PREFACE) + 1)]
    elif kind == 4:
        data = _flipped(draw, http2.PREFACE)
    elif kind == 5:
        data = http2.PREFACE + draw.randbytes(draw.choice((1, 9, 20, 300, 20_000)))
    elif kind == 6:
        data = b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * draw.randrange(1, 5000)
    else:
        data = http2.PREFACE * draw.randrange(2, 50)
    # A byte at a time, as the slow-loris attack does; the connection is given up half-way.
    parts = tuple(bytes([byte]) for byte in data[:12]) if draw.random() < 0.05 else (data,)
    return Wire(parts, draw.choice(_ENDS))


def wrong_frames(draw: random.Random) -> Wire:
    """An RPC in valid frames, then what makes them wrong."""
    mutate = draw.choice(_MUTATIONS)
    parts = mutate(draw, *draw.choice(_TARGETS))
    return Wire((b"".join(parts),), draw.choice(_ENDS))


def _flip(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    parts = frames_of(method, request)
    index = draw.randrange(1, len(parts))
    parts[index] = _flipped(draw, parts[index])
    return parts


def _cut(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    data = b"".join(frames_of(method, request))
    return [data[: draw.randrange(24, len(data))]]


def _order(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    first, *rest = [*frames_of(method, request), *frames_of(method, request, 3, preface=False)]
    chosen = draw.choices(rest, k=draw.randrange(1, 12))
    return [first, *chosen]


def _length(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    *before, _ = frames_of(method, request)
    data = message(request)
    wrong = draw.choice((0, 1, 4, 5, len(data) - 1, len(data) + 1, 16_384, 16_385, 0xFFFFFF))
    return [*before, frame(http2.DATA, http2.END_STREAM, 1, data, length=wrong)]


def _grpc_length(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    *before, _ = frames_of(method, request)
    wrong = draw.choice((0, 1, len(request) + 1, 51 << 20, 0x7FFFFFFF, 0xFFFFFFFF))
    compressed = draw.choice((0, 0, 1, 2, 255))
    data = message(request, compressed=compressed, length=wrong) * draw.randrange(1, 4)
    return [*before, frame(http2.DATA, draw.choice((0, http2.END_STREAM)), 1, data[: draw.randrange(len(data) + 1)])]


def _compressed(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    encoding = draw.choice(("gzip", "deflate", "snappy", "identity", "", "gzip,gzip"))
    packed = gzip.compress(request)
    data = draw.choice((packed, _flipped(draw, packed), packed[:-3], draw.randbytes(40), _SMALL_BOMB))
    return [
        *frames_of(method, request)[:3],
        frame(http2.HEADERS, http2.END_HEADERS, 1, block(request_headers(method, grpc_encoding=encoding))),
        frame(http2.DATA, http2.END_STREAM, 1, message(data, compressed=draw.choice((0, 1, 1, 1)))),
    ]


def _any_frames(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    """Types, flags, streams and payloads at random, in the midst of what is all right."""
    parts = frames_of(method, request)
    for _ in range(draw.randrange(1, 8)):
        odd = frame(
            draw.randrange(12) if draw.random() < 0.9 else draw.randrange(256),
            draw.choice((0, 1, 4, 5, 8, 0x20, 0x2D, 255, draw.randrange(256))),
            draw.choice((0, 1, 2, 3, 5, 0x7FFFFFFF, 0x80000001, draw.randrange(1 << 32))),
            draw.randbytes(draw.choice((0, 1, 4, 5, 6, 8, 9, 100))),
            length=draw.choice((None, None, None, None, 0, 3, 70_000)),
        )
        parts.insert(draw.randrange(1, len(parts) + 1), odd)
    return parts


def _settings(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    pairs = b"".join(
        struct.pack(
            ">HI",
            draw.choice((0, 1, 2, 3, 4, 5, 6, 8, 0xFE03, draw.randrange(1 << 16))),
            draw.choice((0, 1, 16_383, 16_384, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)),
        )
        for _ in range(draw.randrange(1, 20))
    )
    window = frame(http2.WINDOW_UPDATE, 0, draw.choice((0, 1)), struct.pack(">I", draw.choice((0, 1, 0x7FFFFFFF))))
    first, _, *rest = frames_of(method, request)
    return [first, frame(http2.SETTINGS, 0, 0, pairs + bytes(draw.choice((0, 0, 0, 1)))), *rest, window]


def _headers(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    """Header lists that are too much, too odd, or no lists."""
    headers = request_headers(method)
    odd = draw.choice(_ODD_HEADERS)
    if draw.random() < 0.5:
        headers.insert(draw.randrange(len(headers) + 1), odd)
    else:
        headers[draw.randrange(len(headers))] = odd
    if draw.random() < 0.2:
        headers += [(b"x-%d" % index, b"y" * draw.choice((1, 100))) for index in range(draw.choice((10, 200, 2000)))]
    data = block(headers)
    if draw.random() < 0.3:
        data = draw.choice(_ODD_BLOCKS) + data
    pieces = [data[index : index + 16_000] for index in range(0, len(data), 16_000)]
    parts = [
        frame(
            http2.CONTINUATION if index else http2.HEADERS,
            http2.END_HEADERS if index == len(pieces) - 1 else 0,
            1,
            piece,
        )
        for index, piece in enumerate(pieces)
    ]
    return [*frames_of(method, request)[:3], *parts, frame(http2.DATA, http2.END_STREAM, 1, message(request))]


_ODD_HEADERS = (
    (b":path", b""),
    (b":path", b"/"),
    (b":path", b"//"),
    (b":path", b"/backend.Backend/"),
    (b":path", b"/backend.Backend/Health?x=1"),
    (b":path", b"/" + b"x" * 8000),
    (b":path", b"\xff\xfe"),
    (b":method", b"GET"),
    (b":method", b"PUT"),
    (b":scheme", b"gopher"),
    (b":status", b"200"),
    (b":unknown", b"x"),
    (b":authority", b""),
    (b"content-type", b"text/html"),
    (b"content-type", b"application/grpc+json"),
    (b"content-type", b""),
    (b"te", b"gzip"),
    (b"grpc-timeout", b"0n"),
    (b"grpc-timeout", b"-1S"),
    (b"grpc-timeout", b"99999999999999999999H"),
    (b"grpc-timeout", b"1"),
    (b"grpc-timeout", b"x"),
    (b"grpc-timeout", b"1u"),
    (b"grpc-encoding", b"nothing"),
    (b"grpc-accept-encoding", b"," * 500),
    (b"grpc-tags-bin", b"!!!"),
    (b"grpc-trace-bin", b"AAAA"),
    (b"grpc-status", b"0"),
    (b"grpc-message", b"%ZZ"),
    (b"grpc-previous-rpc-attempts", b"x"),
    (b"grpc-retry-pushback-ms", b"-1"),
    (b"x-data-bin", b"\xff\xff"),
    (b"x-data-bin", b"a" * 5),
    (b"X-Upper", b"case"),
    (b"", b""),
    (b"x", b"\0"),
    (b"x", b"line\r\nline"),
    (b"x y", b"space"),
    (b"\xff", b"\xff"),
    (b"host", b"a"),
    (b"connection", b"close"),
    (b"transfer-encoding", b"chunked"),
    (b"authorization", b"Bearer " + b"x" * 4000),
    (b"x-large", b"x" * 20_000),
    (b"x-larger", b"x" * 200_000),
)
_ODD_BLOCKS = (
    b"\x80",  # index 0
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # an index beyond all tables
    http2.integer(1 << 40, 5, 0x20),  # the table's size
    b"\x3f\xe1\x1f",  # a size that is allowed
    b"\x20" * 100,
    b"\x00\x7f\xff\xff\xff\xff\x0f",  # a name of 4 GB
    b"\x00\x81\xff\x00",  # Huffman's padding
    b"\x00\x84\xff\xff\xff\xff\x00",  # Huffman's end
    b"\xbe",  # the dynamic table's first, which is empty
    b"\x40\x01a\x01b" + b"\xbe" * 3000,  # an entry, often
    b"\x82" * 10,
)


def _flood(draw: random.Random, method: str, request: bytes) -> list[bytes]:
    """One frame very often; the last RPC may still be all right."""
    start = [http2.PREFACE, frame(http2.SETTINGS)]
    count = draw.choice((10, 100, _FLOOD))
    what = draw.randrange(9)
    head = block(request_headers(method))
    if what == 0:
        flood = frame(http2.SETTINGS) * count
    elif what == 1:
        flood = frame(http2.PING, 0, 0, bytes(8)) * count
    elif what == 2:
        # Rapid reset (CVE-2023-44487).
        flood = b"".join(
            frame(http2.HEADERS, http2.END_HEADERS, 2 * index + 1, head)
            + frame(http2.RST_STREAM, 0, 2 * index + 1, struct.pack(">I", 8))
            for index in range(min(count, 300))
        )
    elif what == 3:
        flood = frame(http2.HEADERS, http2.END_HEADERS, 1, head) + frame(http2.DATA, 0, 1) * count
    elif what == 4:
        # A list of headers without an end (CVE-2024-27316).
        flood = frame(http2.HEADERS, 0, 1, head) + frame(http2.CONTINUATION, 0, 1, block([(b"x", b"y" * 50)])) * count
    elif what == 5:
        flood = frame(http2.CONTINUATION, 0, 1) * count
    elif what == 6:
        flood = frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 0x7FFFFFFF)) * count
    elif what == 7:
        flood = b"".join(
            frame(http2.PRIORITY, 0, 2 * index + 1, struct.pack(">IB", 2 * index + 1, 255)) for index in range(count)
        )
    else:
        # Streams that are opened and never closed.
        flood = b"".join(
            frame(http2.HEADERS, http2.END_HEADERS, 2 * index + 1, head) for index in range(min(count, 300))
        )
    return [*start, flood, *frames_of(method, request, 9999, preface=False)]


def _flipped(draw: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        if out:
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


_Mutation = Callable[[random.Random, str, bytes], list[bytes]]
_MUTATIONS: tuple[_Mutation, ...] = (
    _flip,
    _flip,
    _cut,
    _order,
    _length,
    _grpc_length,
    _compressed,
    _any_frames,
    _any_frames,
    _settings,
    _headers,
    _headers,
    _flood,
)
