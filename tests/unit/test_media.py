"""Strings of the wire -> content parts: what each entry is, and where it goes."""

import base64
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.errors import InvalidRequest
from common.media import MODALITIES, MOST_ITEMS, fields_of, media_items, place, place_in_prompt, source
from common.pb import backend_pb2 as pb
from common.request import generation_request

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 16
JPEG = b"\xff\xd8\xff\xe0" + b"\0" * 16
WAV = b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 16
MP4 = b"\0\0\0\x20ftypisom" + b"\0" * 16
# Beginnings of each kind; the second is a path's, were it not base64.
BEGINNINGS = [PNG, JPEG, WAV, MP4, b"\xff\xfb\x90\0", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"OggS", b"fLaC", b"%PDF-1.7"]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def urls(**fields: Any) -> list[str]:
    return [item.url for item in media_items(pb.PredictOptions(**fields))]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b64(PNG), "base64"),
        (b64(JPEG), "base64"),
        ("/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRof", "base64"),
        ("/9j/", "base64"),
        ("//uQxAAAAAAAAAAA", "base64"),
        ("/tmp/a.png", "path"),
        ("/tmp/images", "path"),
        ("/etc/passwd", "path"),
        ("/etc/password", "path"),
        ("/data/generated/images/b642 (1).jpg", "path"),
        ("/", "path"),
        ("/" + "A" * 5000, "base64"),
        ("data:image/png;base64,AAAA", "data"),
        ("DATA:image/png,AAAA", "data"),
        ("http://example.com/a.png", "http"),
        ("HTTPS://example.com/a.png", "http"),
        ("ftp://example.com/a.png", "unknown"),
        ("file:///etc/passwd", "unknown"),
        ("C:\\a.png", "unknown"),
        ("javascript:alert(1)", "unknown"),
        ("", "base64"),
        ("a.png", "base64"),
    ],
)
def test_source(text: str, kind: str) -> None:
    assert source(text) == kind


@given(st.text())
@example("/\0")
@example("/9j/" + "\ud7ff")
def test_source_of_anything(text: str) -> None:
    assert source(text) in ("data", "http", "path", "base64", "unknown")


@given(st.sampled_from(BEGINNINGS), st.binary(max_size=200))
def test_base64_of_media_is_base64(beginning: bytes, rest: bytes) -> None:
    assert source(b64(beginning + rest)) == "base64"


@given(st.binary(min_size=1, max_size=200))
def test_base64_is_never_taken_for_a_url(data: bytes) -> None:
    # A path at most: bytes that begin like no media and like a path.
    kind = source(b64(data))
    assert kind == "base64" or (kind == "path" and b64(data).startswith("/"))


@given(st.lists(st.from_regex(r"[a-z0-9_. -]{1,20}", fullmatch=True), min_size=1, max_size=5))
def test_paths_are_paths(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    # The one folder name that base64 of media takes.
    assert source(path) == "path" or path.startswith("/9j/")


@given(st.text(), st.sampled_from(list(MODALITIES)))
@example("data:;base64,", "Images")
@example("data:image/png;base64", "Images")
@example("data:,", "Audios")
def test_any_text_is_understood_or_refused_by_name(text: str, name: str) -> None:
    options = pb.PredictOptions()
    getattr(options, name).append(text)
    try:
        (item,) = media_items(options)
    except InvalidRequest as refusal:
        field, said = refusal.field, str(refusal)
        assert len(text) < 12 or text not in said
    else:
        field = item.where
        assert item.url.startswith((f"{name}[0] data:", f"{name}[0] http", f"{name}[0] file:///"))
    assert field == f"{name}[0]"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Images": [b64(PNG)]}, f"Images[0] data:image/png;base64,{b64(PNG)}"),
        ({"Images": [f"data:text/plain;charset=x;base64,{b64(PNG)}"]}, f"Images[0] data:image/png;base64,{b64(PNG)}"),
        ({"Images": ["data:image/x-odd;base64,AAAA"]}, "Images[0] data:image/x-odd;base64,AAAA"),
        ({"Images": ["AAAA"]}, "Images[0] data:;base64,AAAA"),
        ({"Images": [" AA\r\nAA\n"]}, "Images[0] data:;base64,AAAA"),
        ({"Images": ["/a b/ü.png"]}, "Images[0] file:///a%20b/%C3%BC.png"),
        ({"Images": ["https://example.com/a?b=c#d"]}, "Images[0] https://example.com/a?b=c#d"),
        ({"Audios": [b64(WAV)]}, f"Audios[0] data:audio/wav;base64,{b64(WAV)}"),
        ({"Audios": [b64(MP4)]}, f"Audios[0] data:video/mp4;base64,{b64(MP4)}"),
        ({"Videos": [b64(MP4)]}, f"Videos[0] data:video/mp4;base64,{b64(MP4)}"),
        ({"Videos": [b64(b"GIF89a")]}, f"Videos[0] data:image/gif;base64,{b64(b'GIF89a')}"),
    ],
)
def test_urls(fields: dict[str, list[str]], expected: str) -> None:
    assert urls(**fields) == [expected]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"Images": ["AAAA", ""]}, "Images[1]", "is empty"),
        ({"Audios": ["\n"]}, "Audios[0]", "is empty"),
        ({"Images": ["data:image/png;base64,"]}, "Images[0]", "is empty"),
        ({"Images": ["data:image/png,secret"]}, "Images[0]", "base64"),
        ({"Images": ["data:image/png;base64;secret"]}, "Images[0]", "base64"),
        ({"Images": ["file:///secret"]}, "Images[0]", "is neither"),
        ({"Images": [b64(b"%PDF-1.7 secret")]}, "Images[0]", "application/pdf"),
        ({"Images": [b64(WAV)]}, "Images[0]", "audio/wav"),
        ({"Audios": [b64(PNG)]}, "Audios[0]", "image/png"),
        ({"Videos": [b64(PNG)]}, "Videos[0]", "image/png"),
    ],
)
def test_refused(fields: dict[str, list[str]], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        urls(**fields)
    assert caught.value.field == field
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("field", MODALITIES)
def test_more_than_are_looked_at(field: str) -> None:
    options = pb.PredictOptions()
    getattr(options, field).extend(["AAAA"] * MOST_ITEMS)
    assert len(media_items(options)) == MOST_ITEMS
    getattr(options, field).append("")
    with pytest.raises(InvalidRequest, match=f"^{field}: has 1001; use at most 1000$"):
        media_items(options)


def test_order_and_names() -> None:
    items = media_items(pb.PredictOptions(Audios=["AAAA"], Images=["AAAA", "AAAA"], Videos=["AAAA"]))
    assert [item.where for item in items] == ["Images[0]", "Images[1]", "Videos[0]", "Audios[0]"]
    assert fields_of(items) == "Images, Videos, Audios"
    assert items[0].part == {"type": "image_url", "image_url": {"url": "Images[0] data:;base64,AAAA"}}
    assert items[2].part["type"] == "video_url"
    assert items[3].part["type"] == "audio_url"
    assert "AAAA" not in repr(items)


# Messages are written as role:text, media as the initial of their field and their index.
@pytest.mark.parametrize(
    ("messages", "media", "expected"),
    [
        (["user:hi"], "", ["hi"]),
        (["user:hi"], "i", [["i0", "hi"]]),
        (["user:"], "i", [["i0"]]),
        (["user:hi"], "iiva", [["i0", "i1", "v0", "a0", "hi"]]),
        (["user:one", "assistant:two", "user:three"], "i", ["one", "two", ["i0", "three"]]),
        (["user:one", "assistant:two"], "i", [["i0", "one"], "two"]),
        (["user:<__media__>one", "user:two"], "i", [["i0", "one"], "two"]),
        (["user:a<__media__>b<__media__>c"], "ii", [["a", "i0", "b", "i1", "c"]]),
        (["user:<__media__>a", "user:<__media__>b"], "iii", [["i0", "a"], ["i2", "i1", "b"]]),
        # The orchestrator's template puts sounds before images.
        (["user:<__media__><__media__>x"], "ia", [["a0", "i0", "x"]]),
        (["user:[vid-1]b[vid-0]a"], "vv", [["v1", "b", "v0", "a"]]),
        (["user:[vid-0]<__media__>a"], "iv", [["v0", "i0", "a"]]),
        # Nothing for them: text.
        (["user:<__media__>"], "", ["<__media__>"]),
        (["user:<__media__><__media__>"], "i", [["i0", "<__media__>"]]),
        (["user:[vid-7]"], "v", [["v0", "[vid-7]"]]),
        ([f"user:[vid-{'9' * 5000}]"], "v", [["v0", f"[vid-{'9' * 5000}]"]]),
        (["user:[vid-0][vid-0]"], "v", [["v0", "[vid-0]"]]),
        # One text, as it was written: vLLM puts line breaks between several, and each costs time.
        (["user:a[vid-7]b[vid-0]c[vid-8][vid-9]d"], "v", [["a[vid-7]b", "v0", "c[vid-8][vid-9]d"]]),
        (["user:a[vid-7]b", "user:c[vid-8]d"], "v", [["a[vid-7]b"], ["v0", "c[vid-8]d"]]),
        (["user:<__media__>"], "v", [["v0", "<__media__>"]]),
        (["system:<__media__>", "user:a"], "i", ["<__media__>", ["i0", "a"]]),
    ],
)
def test_place(messages: list[str], media: str, expected: list[Any]) -> None:
    fields: dict[str, Any] = {name: ["AAAA"] * media.count(name[0].lower()) for name in MODALITIES}
    openai: list[dict[str, Any]] = [
        {"role": role, "content": text} for role, _, text in (message.partition(":") for message in messages)
    ]
    place(openai, media_items(pb.PredictOptions(**fields)))
    assert [_written(message["content"]) for message in openai] == expected


def _written(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return [
        part["text"]
        if part["type"] == "text"
        else part[part["type"]]["url"]
        .partition(" ")[0]
        .lower()
        .replace("mages[", "")
        .replace("ideos[", "")
        .replace("udios[", "")[:-1]
        for part in content
    ]


# What a model could have: a bare token, what a chat puts around it, and numbers.
OWN = {"<image>": "image", "<video>": "video", "<a>": "audio", "Audio 1: <a>": "audio", "Audio 2: <a>": "audio"}
WRITTEN = {"image": "<image>", "video": "<video>", "audio": "Audio {}: <a>"}


@pytest.mark.parametrize(
    ("prompt", "media", "expected", "order"),
    [
        ("hi", "", "hi", ""),
        ("<__media__>[vid-0]hi", "", "<__media__>[vid-0]hi", ""),
        ("<__media__>hi", "i", "<image>hi", "i0"),
        ("a <__media__> b", "i", "a <image> b", "i0"),
        ("[vid-0]hi", "v", "<video>hi", "v0"),
        ("<__media__>hi", "a", "Audio 1: <a>hi", "a0"),
        # The orchestrator's template puts sounds before images.
        ("<__media__><__media__>[vid-0]x", "iav", "Audio 1: <a><image><video>x", "a0 i0 v0"),
        ("[vid-1]b[vid-0]a", "vv", "<video>b<video>a", "v1 v0"),
        ("<__media__>x<__media__>", "aa", "Audio 1: <a>xAudio 2: <a>", "a0 a1"),
        # Nothing for them: text.
        ("<__media__><__media__>", "i", "<image><__media__>", "i0"),
        ("<__media__>[vid-7]", "i", "<image>[vid-7]", "i0"),
        (f"[vid-{'0' * 5000}]hi", "v", f"<video>[vid-{'0' * 5000}]hi", "v0"),
        # The model's own, one for each.
        ("<image>hi", "i", "<image>hi", "i0"),
        ("x<image>y<image>", "ii", "x<image>y<image>", "i0 i1"),
        ("<a>hi", "a", "<a>hi", "a0"),
        ("Audio 1: <a>Audio 2: <a>hi", "aa", "Audio 1: <a>Audio 2: <a>hi", "a0 a1"),
        ("<image><__media__>", "ii", "<image><image>", "i0 i1"),
        ("<__media__><image>", "ii", "<image><image>", "i0 i1"),
        ("<a> and <__media__>", "aa", "<a> and Audio 2: <a>", "a0 a1"),
        # Its own, too few or too many: as it is.
        ("<image>hi", "ii", "<image>hi", "i0 i1"),
        ("<image><image>hi", "i", "<image><image>hi", "i0"),
        ("<image>hi<__media__>", "i", "<image>hi<__media__>", "i0"),
        # Neither: to the front.
        ("hi", "i", "<image>hi", "i0"),
        ("hi", "iv", "<image><video>hi", "i0 v0"),
        ("hi", "aa", "Audio 1: <a>Audio 2: <a>hi", "a0 a1"),
        ("hi<image>", "iv", "<video>hi<image>", "v0 i0"),
        ("x<__media__>hi", "ii", "<image>x<image>hi", "i1 i0"),
        ("x<__media__>hi", "aa", "Audio 1: <a>xAudio 2: <a>hi", "a1 a0"),
    ],
)
def test_place_in_prompt(prompt: str, media: str, expected: str, order: str) -> None:
    fields: dict[str, Any] = {name: ["AAAA"] * media.count(name[0].lower()) for name in MODALITIES}
    items = media_items(pb.PredictOptions(**fields))
    text, ordered = place_in_prompt(prompt, items, OWN, lambda modality, number: WRITTEN[modality].format(number))
    assert text == expected
    assert " ".join(f"{item.where[0].lower()}{item.where[-2]}" for item in ordered) == order


def test_a_model_that_needs_no_placeholder() -> None:
    items = media_items(pb.PredictOptions(Images=["AAAA"]))
    for prompt in ("<__media__>hi", "hi"):
        assert place_in_prompt(prompt, items, {}, lambda *_: None) == ("hi", list(items))


@given(st.lists(st.sampled_from(["<__media__>", "[vid-0]", "[vid-1]", "<image>", "<a>", "hi"])), st.text("iva"))
def test_every_item_stays(pieces: list[str], media: str) -> None:
    fields: dict[str, Any] = {name: ["AAAA"] * media.count(name[0].lower()) for name in MODALITIES}
    items = media_items(pb.PredictOptions(**fields))
    text, ordered = place_in_prompt("".join(pieces), items, OWN, lambda modality, _: WRITTEN[modality])
    assert sorted(ordered, key=items.index) == list(items)
    assert text.count("hi") == pieces.count("hi")


@pytest.mark.timeout(30)
def test_a_marker_does_not_look_at_all_items() -> None:
    """Where each of them does, these take minutes."""
    items = media_items(pb.PredictOptions(Images=["AAAA"] * MOST_ITEMS))
    text = "[vid-1]" * 500_000
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    place(messages, items)
    *media, last = messages[0]["content"]
    assert media == [item.part for item in items]
    assert last == {"type": "text", "text": text}
    assert place_in_prompt(text, items, OWN, lambda *_: "") == (text, list(items))


def test_nobody_to_have_it() -> None:
    with pytest.raises(InvalidRequest) as caught:
        place([{"role": "system", "content": "x"}], media_items(pb.PredictOptions(Audios=["AAAA"])))
    assert caught.value.field == "Audios[0]"


def test_chat_request() -> None:
    options = pb.PredictOptions(
        UseTokenizerTemplate=True,
        Messages=[pb.Message(role="user", content="hi")],
        Images=[b64(PNG)],
        Audios=[b64(WAV)],
    )
    request = generation_request(options, stream=False, has_tool_parser=False)
    (message,) = request.openai.messages
    assert [part["type"] for part in message["content"]] == ["image_url", "audio_url", "text"]
    assert len(request.media) == 2
    assert b64(PNG) not in repr(request.media)


def test_raw_request() -> None:
    request = generation_request(
        pb.PredictOptions(Prompt="<image> hi", Images=[b64(PNG)]), stream=False, has_tool_parser=False
    )
    assert request.openai.prompt == "<image> hi"
    assert fields_of(request.media) == "Images"
