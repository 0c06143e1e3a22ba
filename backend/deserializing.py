"""The bytes of a request become a message, or the reason why they don't."""

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError

from common.errors import InvalidRequest

M = TypeVar("M")

# Numbers that are packed, as all clients send them, count as one. 17 million empty messages fit into 50 MiB: they are
# 2 GB, and a second in which nothing else is done.
MOST_VALUES = 100_000
_LARGE = 4 * 2**20
# Wire types of protobuf, and the bytes of those that are always as long.
_VARINT, _LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}
_GROUP = (3, 4)


class Unread:
    """Stands for a request whose bytes are not made into a message."""

    def __init__(self, problem: str) -> None:
        self.error = InvalidRequest("request", problem)


_MALFORMED = Unread("its bytes are not a message of this RPC's type")
_CROWDED = Unread(f"has more than {MOST_VALUES} values in its fields; use at most so many")


def forgiving(deserializer: Callable[[bytes], M]) -> Callable[[bytes], M | Unread]:
    """gRPC answers bytes that it can't read with UNKNOWN and logs a traceback; they are the caller's mistake."""

    def deserialize(data: bytes) -> M | Unread:
        if len(data) > _LARGE and is_crowded(data):
            return _CROWDED
        try:
            return deserializer(data)
        except DecodeError:
            return _MALFORMED

    return deserialize


def is_crowded(data: bytes) -> bool:
    """Whether a message on the wire has more than `MOST_VALUES` fields at its top; False where it is malformed.

    protobuf's own `UnknownFieldSet` counts them, too, but only once each is an object.
    """
    at, end = 0, len(data)
    try:
        for _ in range(MOST_VALUES):
            if at >= end:
                return False
            key, at = _varint(data, at)
            kind = key & 7
            if kind == _VARINT:
                _, at = _varint(data, at)
            elif kind == _LENGTH:
                length, at = _varint(data, at)
                at += length
            elif kind in _FIXED:
                at += _FIXED[kind]
            elif kind not in _GROUP:  # what is in a group counts as well
                return False
    except IndexError:
        return False
    return at < end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next thing begins."""
    number = shift = 0
    while True:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return number, at
        shift += 7
