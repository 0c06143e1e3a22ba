"""Images, videos and audio clips: strings of the wire, in flat lists over all messages -> parts of the messages.

Nothing is fetched or decoded here; `media_connector` does that. No text raised here holds anything of a payload.
"""

import base64
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import InvalidRequest
from common.media_kinds import fits, sniff
from common.pb import backend_pb2 as pb

MODALITIES = {"Images": "image", "Videos": "video", "Audios": "audio"}
# The orchestrator's own, which its default template for media writes.
MARKER = "<__media__>"
_MARKER = re.compile(r"<__media__>|\[vid-\d{1,9}\]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_PATH_MAX = 4096
# In each field; vLLM takes 999 of a modality, and looks at each before it counts them.
MOST_ITEMS = 1000


@dataclass(frozen=True)
class Item:
    """One image, video or audio clip."""

    where: str
    """The wire's name: `Images[0]`."""
    modality: str
    """image, video or audio."""
    url: str = field(repr=False)
    """data:, http(s): or file:, after `where` and a space; only `media_connector` takes such a URL."""

    @property
    def part(self) -> dict[str, Any]:
        """The content part of an OpenAI message."""
        kind = f"{self.modality}_url"
        return {"type": kind, kind: {"url": self.url}}


def media_items(options: pb.PredictOptions) -> tuple[Item, ...]:
    """All media of a request: images, then videos, then audio clips.

    Raises:
        InvalidRequest: there are more than `MOST_ITEMS` of a kind; an entry is neither base64, a data: URI, an http(s)
            URL nor an absolute path, or it is empty, or its first bytes are of another modality. Nothing is fetched or
            decoded here.

    """
    for name in MODALITIES:
        if (count := len(getattr(options, name))) > MOST_ITEMS:
            raise InvalidRequest(name, f"has {count}; use at most {MOST_ITEMS}")
    return tuple(
        Item(where, modality, f"{where} {_url(where, modality, text.strip())}")
        for name, modality in MODALITIES.items()
        for index, text in enumerate(getattr(options, name))
        for where in [f"{name}[{index}]"]
    )


def source(text: str) -> str:
    """What an entry is: "data", "http", "path", "base64", or "unknown" for any other scheme. Never looks at a disk.

    Base64 may begin with a slash as paths do: every JPEG and MP3 does. It is base64 if known media begin that way.
    """
    if text[:5].lower() == "data:":
        return "data"
    if scheme := _SCHEME.match(text):
        return "http" if scheme[0].lower() in ("http:", "https:") else "unknown"
    if text.startswith("/") and len(text) <= _PATH_MAX and sniff(_first_bytes(text)) is None:
        return "path"
    return "base64"


def fields_of(items: Iterable[Item]) -> str:
    """The wire's fields that `items` came in: `Images, Audios`."""
    return ", ".join(dict.fromkeys(item.where.partition("[")[0] for item in items))


def place(messages: list[dict[str, Any]], items: Sequence[Item]) -> None:
    """Put `items` into OpenAI `messages`, in place: where a marker stands, the others before the last user's text.

    A marker `<__media__>` takes the next audio clip, then the next image; `[vid-N]` takes the video N. A marker for
    which there is nothing stays text.

    Raises:
        InvalidRequest: there is no message of a user.

    """
    if not items:
        return
    users = [message for message in messages if message["role"] == "user"]
    if not users:
        raise InvalidRequest(items[0].where, "there is no message of the role user that it could belong to")
    unplaced = _Unplaced(items)
    for message in users:
        if _MARKER.search(message["content"]):
            message["content"] = list(_parts(message["content"], unplaced))
    if rest := unplaced.rest():
        content = users[-1]["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}] if content else []
        users[-1]["content"] = [*(item.part for item in rest), *content]


def place_in_prompt(
    prompt: str, items: Sequence[Item], own: Mapping[str, str], placeholder: Callable[[str, int], str | None]
) -> tuple[str, list[Item]]:
    """A raw prompt with the model's own placeholders in the places of its markers, and `items` in the prompt's order.

    Markers take items as in `place`, and each of the model's own placeholders takes the next item of its modality. The
    others go to the front, unless the prompt has own placeholders of their modality: then it is the writer who counts.

    Args:
        prompt: the text; a marker for which there is nothing stays in it.
        items: all media of the request.
        own: the placeholders that the model knows, with the modality of each.
        placeholder: what to write for the item number i, from 1, of a modality; None where the model needs nothing.

    """
    pattern = "|".join([_MARKER.pattern, *(f"({re.escape(text)})" for text in sorted(own, key=len, reverse=True))])
    unplaced = _Unplaced(items)
    pieces: list[tuple[str, Item | None]] = []
    written: set[str] = set()
    begin = 0
    for marker in re.finditer(pattern, prompt):
        if modality := own.get(marker[0]):
            written.add(modality)
        if item := (modality and unplaced.next_of(modality)) or unplaced.marked(marker[0]):
            pieces += [(prompt[begin : marker.start()], None), (marker[0], item)]
            begin = marker.end()
    pieces.append((prompt[begin:], None))
    rest = unplaced.rest()
    front = [item for item in rest if item.modality not in written]
    text: list[str] = []
    order: list[Item] = []
    numbers: Counter[str] = Counter()
    for piece, item in [*(("", item) for item in front), *pieces]:
        if item:
            order.append(item)
            numbers[item.modality] += 1
        if item and piece not in own:
            text.append(placeholder(item.modality, numbers[item.modality]) or "")
        else:
            text.append(piece)
    return "".join(text), [*order, *(item for item in rest if item.modality in written)]


def _url(where: str, modality: str, text: str) -> str:
    kind = source(text)
    if kind == "unknown":
        raise InvalidRequest(where, "is neither base64, a data: URI, an http(s) URL nor an absolute path")
    if kind in ("http", "path"):
        return text if kind == "http" else Path(text).as_uri()
    stated = ""
    if kind == "data":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise InvalidRequest(where, "is a data: URI without `;base64,`")
        stated = header[len("data:") : -len(";base64")]
    for space in " \n\r\t":
        text = text.replace(space, "")
    if not text:
        raise InvalidRequest(where, "is empty")
    found = sniff(_first_bytes(text))
    if found and not fits(found, modality):
        raise InvalidRequest(where, f"holds {found}, which is not of the kind {modality}")
    return f"data:{found or stated};base64,{text}"


def _first_bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text[:24], validate=True)
    except ValueError:
        return b""


class _Unplaced:
    """The items that have no place yet. There may be millions of markers: none of them looks at all items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = {item.where: item for item in items}
        self._queues = {each: deque(item for item in items if item.modality == each) for each in MODALITIES.values()}

    def next_of(self, modality: str) -> Item | None:
        """Take the first one of `modality`."""
        queue = self._queues.get(modality, deque())
        while queue:
            if item := self._items.pop(queue.popleft().where, None):
                return item
        return None

    def marked(self, marker: str) -> Item | None:
        """Take the one that `marker` stands for; a model's own placeholder stands for none."""
        if marker == MARKER:
            return self.next_of("audio") or self.next_of("image")
        number = marker.removeprefix("[vid-").removesuffix("]")
        return self._items.pop(f"Videos[{int(number)}]", None) if number.isdecimal() else None

    def rest(self) -> list[Item]:
        """Those that are left, in their order."""
        return list(self._items.values())


def _parts(text: str, unplaced: _Unplaced) -> Iterator[dict[str, Any]]:
    """The parts of a text with markers, no two of them text; a marker that takes nothing is text as well."""
    begin = 0
    for marker in _MARKER.finditer(text):
        if item := unplaced.marked(marker[0]):
            if begin < marker.start():
                yield {"type": "text", "text": text[begin : marker.start()]}
            begin = marker.end()
            yield item.part
    if begin < len(text):
        yield {"type": "text", "text": text[begin:]}
