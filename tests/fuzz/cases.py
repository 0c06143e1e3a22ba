"""What a case is, and how it becomes a file of the corpus and back.

A case is made from `FUZZ_SEED`, its kind and its number alone, so that any of them can be made again by itself.
"""

import base64
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHOWN_BYTES = 400


@dataclass(frozen=True)
class Wire:
    """Bytes on a connection of their own.

    Attributes:
        parts: written one after another, a moment apart.
        end: `close`: at once; `half`: our side first, then as the server answers; `reset`: with a TCP reset;
            `wait`: until the server has said something.

    """

    parts: tuple[bytes, ...]
    end: str = "close"


@dataclass(frozen=True)
class Call:
    """An RPC with bytes for a request, whatever they are.

    Attributes:
        method: as on the wire, `/package.Service/Method`.
        requests: one, or those of a stream.
        metadata: sent along.
        leaves_after: seconds after which the client goes away; None: it stays for the answer.

    """

    method: str
    requests: tuple[bytes, ...]
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    leaves_after: float | None = None


Case = Wire | Call


def shown(case: Case) -> str:
    """A case in one line of bearable length."""
    return f"{repr(case)[:_SHOWN_BYTES]}…"


def saved(case: Case, note: str) -> str:
    """The text of a file of the corpus."""
    if isinstance(case, Wire):
        value: dict[str, Any] = {"end": case.end, "parts": [_packed(part) for part in case.parts]}
    else:
        value = {"method": case.method, "requests": [_packed(request) for request in case.requests]}
        if case.metadata:
            value["metadata"] = [
                [key, {"bytes": _packed(text)} if isinstance(text, bytes) else text] for key, text in case.metadata
            ]
        if case.leaves_after is not None:
            value["leaves_after"] = case.leaves_after
    return json.dumps({"note": note, **value}, indent=1) + "\n"


def read(path: Path) -> Case:
    """The case in a file of the corpus."""
    value = json.loads(path.read_text())
    if "method" not in value:
        return Wire(tuple(_unpacked(part) for part in value["parts"]), value["end"])
    return Call(
        value["method"],
        tuple(_unpacked(request) for request in value["requests"]),
        tuple(
            (key, _unpacked(text["bytes"]) if isinstance(text, dict) else text)
            for key, text in value.get("metadata", [])
        ),
        value.get("leaves_after"),
    )


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
