"""Cases for the RPCs: bytes that are no message, and messages of all types with anything in their fields."""

import math
import random
from typing import Any

from google.protobuf import descriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from common.pb import backend_pb2 as pb
from tests.fuzz.cases import Call

BACKEND = "/backend.Backend/"
# They change what the other cases are asked of, so they get cases of their own.
CHANGING = (f"{BACKEND}Free", f"{BACKEND}LoadModel")

METHODS: dict[str, descriptor.MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for module in (pb, health_pb2, reflection_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# Watch goes on until its client leaves, and so does what reads a stream.
ENDLESS = ("/grpc.health.v1.Health/Watch",)

_Field = descriptor.FieldDescriptor
_INTEGERS = (0, 1, -1, 2, 7, 100, 1000, 2**31 - 1, -(2**31))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 2.0000001, 1e-45, 3.4e38, -3.4e38, math.nan, math.inf, -math.inf)
TEXTS = (
    "",
    " ",
    "a",
    "\0",
    "\x7f\x1b[31m",
    "{}",
    "[]",
    "null",
    "true",
    "NaN",
    "../../etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "file:///etc/passwd",
    "http://127.0.0.1:1/",
    "data:image/png;base64,AAAA",
    "%s%n%x",
    "{{ 7 * 7 }}",
    "<|im_end|>",
    "<tool_call>",
    "<think>",
    "<__media__>",
    "[vid-0]",
    "\ufeff\u202e\ufffd\uffff",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7\U0001d54f",
    "a\u0301" * 200,
    "\ufdfa" * 500,
)


def text(draw: random.Random) -> str:
    """Any string that protobuf can carry; rarely a long one."""
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(TEXTS)
    if kind < 0.9:
        return "".join(chr(_code_point(draw)) for _ in range(draw.randrange(1, 30)))
    return draw.choice(TEXTS[2:]) * draw.choice((10, 100, 1000))


def _code_point(draw: random.Random) -> int:
    value = draw.choice((draw.randrange(128), draw.randrange(0x3000), draw.randrange(0x110000)))
    return value if not 0xD800 <= value < 0xE000 else 0xFFFD


def value(draw: random.Random, field: descriptor.FieldDescriptor, depth: int) -> Any:
    """One value for a field that is no message."""
    if field.type == _Field.TYPE_STRING:
        return text(draw)
    if field.type == _Field.TYPE_BYTES:
        return draw.randbytes(draw.randrange(40))
    if field.type == _Field.TYPE_BOOL:
        return draw.random() < 0.5
    if field.type in (_Field.TYPE_FLOAT, _Field.TYPE_DOUBLE):
        return draw.choice(_FLOATS)
    if field.type == _Field.TYPE_ENUM:
        return draw.choice((0, 1, 2))
    number = draw.choice(_INTEGERS)
    return abs(number) if field.type in (_Field.TYPE_UINT32, _Field.TYPE_UINT64) else number


def fill(draw: random.Random, message: Any, share: float = 0.15, depth: int = 0) -> Any:
    """Set that share of the fields of `message` to anything; returns it."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() >= share:
            continue
        if field.message_type is None:
            if field.is_repeated:
                getattr(message, field.name).extend(value(draw, field, depth) for _ in range(draw.randrange(4)))
            else:
                setattr(message, field.name, value(draw, field, depth))
        elif field.message_type.GetOptions().map_entry:
            entries = getattr(message, field.name)
            key, entry = field.message_type.fields
            for _ in range(draw.randrange(3)):
                if entry.message_type is None:
                    entries[value(draw, key, depth)] = value(draw, entry, depth)
        elif depth < 4:
            if field.is_repeated:
                for _ in range(draw.randrange(3)):
                    fill(draw, getattr(message, field.name).add(), 0.5, depth + 1)
            else:
                fill(draw, getattr(message, field.name), 0.5, depth + 1)
    return message


def random_bytes(draw: random.Random) -> Call:
    """An RPC with bytes at random, or with those of a message that were cut or changed."""
    method = draw.choice(tuple(METHODS))
    request = bytes_for(draw, method)
    if method == f"{BACKEND}Free" and _is_message(method, request):
        method = f"{BACKEND}Health"
    stay = 0.05 if method in ENDLESS else None
    count = draw.randrange(4) if METHODS[method].client_streaming else 1
    return Call(method, tuple(request for _ in range(count)), leaves_after=stay)


def bytes_for(draw: random.Random, method: str) -> bytes:
    """The bytes of a request."""
    kind = draw.randrange(5)
    if kind == 0:
        return draw.randbytes(draw.choice((0, 1, 2, 5, 20, 200, 5000)))
    message = fill(draw, GetMessageClass(METHODS[method].input_type)())
    if isinstance(message, pb.PredictOptions):
        message.Tokens = draw.randrange(1, 3)
    if isinstance(message, pb.ModelOptions):
        message.Model = "/nowhere"
    data = bytearray(message.SerializeToString())
    if kind == 1:
        return bytes(data[: draw.randrange(len(data) + 1)])
    if kind == 2:
        return bytes(data) + draw.randbytes(draw.randrange(1, 9))
    if kind == 3:
        for _ in range(draw.choice((1, 1, 3))):
            if data:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    # Groups in groups, as deep as they may be and deeper.
    return b"\x0b" * draw.choice((1, 50, 100, 101, 10_000)) + bytes(data)


def _is_message(method: str, data: bytes) -> bool:
    try:
        GetMessageClass(METHODS[method].input_type).FromString(data)
    except Exception:  # noqa: BLE001  # it is not
        return False
    return True
