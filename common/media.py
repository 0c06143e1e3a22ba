"""Images, videos and audio clips: strings of the wire, in flat lists over all messages -> parts of the messages.

Nothing is fetched or decoded here; `media_connector` does that. No text raised here holds anything of a payload.
"""

import base64
import re
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
_MARKER = re.compile(r"(<__media__>|\[vid-\d{1,9}\])")
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
    unplaced = list(items)
    for message in users:
        if _MARKER.search(message["content"]):
            message["content"] = list(_parts(message["content"], unplaced))
    if unplaced:
        content = users[-1]["content"]
        text = list(_parts(content, [])) if isinstance(content, str) else content
        users[-1]["content"] = [*(item.part for item in unplaced), *text]


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
    unplaced = list(items)
    pieces: list[tuple[str, Item | None]] = []
    for piece in filter(None, re.split(pattern, prompt)):
        modality = own.get(piece)
        item = next((item for item in unplaced if item.modality == modality), None) or _marked(piece, unplaced)
        if item:
            unplaced.remove(item)
        pieces.append((piece, item))
    written = {own[piece] for piece, _ in pieces if piece in own}
    front = [item for item in unplaced if item.modality not in written]
    text: list[str] = []
    order: list[Item] = []
    for piece, item in [*(("", item) for item in front), *pieces]:
        if item:
            order.append(item)
        if item and piece not in own:
            number = sum(other.modality == item.modality for other in order)
            text.append(placeholder(item.modality, number) or "")
        else:
            text.append(piece)
    return "".join(text), [*order, *(item for item in unplaced if item.modality in written)]


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


def _parts(text: str, unplaced: list[Item]) -> Iterator[dict[str, Any]]:
    """The parts of a text with markers, no two of them text; takes the items that it uses out of `unplaced`."""
    said: list[str] = []
    for piece in filter(None, _MARKER.split(text)):
        item = _marked(piece, unplaced)
        if item is None:
            said.append(piece)
            continue
        unplaced.remove(item)
        if said:
            yield {"type": "text", "text": "".join(said)}
            said = []
        yield item.part
    if said:
        yield {"type": "text", "text": "".join(said)}


def _marked(piece: str, items: Iterable[Item]) -> Item | None:
    if piece == MARKER:
        sounds_first = sorted(items, key=lambda item: item.modality)
        return next((item for item in sounds_first if item.modality != "video"), None)
    if _MARKER.fullmatch(piece):
        number = int(piece[len("[vid-") : -1])
        return next((item for item in items if item.where == f"Videos[{number}]"), None)
    return None
