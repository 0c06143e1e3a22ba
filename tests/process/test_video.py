"""Videos through a real engine: the model sees them in time, and what is no video harms nobody."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.clips import video
from tests.models import ensure, torchvision
from tests.process.media import SECRET, answer, b64, chat, prompt_tokens, raw, refused, said
from tests.process.orchestrator import Backend
from tests.process.wire import check_shape, content, model_options

BRIGHTER = range(0, 200, 10)
DAWN, DUSK = video(BRIGHTER), video(BRIGHTER[::-1])
OWN = "<|vision_start|><|video_pad|><|vision_end|>"


def seen(*videos: str, text: str = "What is this?", **fields: Any) -> Any:
    return chat(text, Videos=videos, **fields)


def frames(count: int) -> str:
    return b64(video([index % 250 for index in range(count)]))


def picture(colour: str, kind: str = "PNG", *others: str) -> str:
    file = io.BytesIO()
    first, *rest = (Image.new("RGB", (60, 60), name) for name in (colour, *others))
    first.save(file, kind, **({"save_all": True, "append_images": rest} if rest else {}))
    return b64(file.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files a request may name."""
    folder = tmp_path_factory.mktemp("allowed videos")
    (folder / "dawn.avi").write_bytes(DAWN)
    (folder / "empty.avi").write_bytes(b"")
    (folder.parent / "outside.avi").write_bytes(DAWN)
    return folder


@pytest.fixture(scope="module")
def watching(folder: Path) -> Iterator[Backend]:
    """A server with the toy Qwen2-VL in it, which takes two videos and an image."""
    with Backend(env={"PYTHONPATH": torchvision.python_path(), "VLLM_MAX_IMAGE_PIXELS": str(2**16)}) as backend:
        backend.wait_for_health()
        result = backend.load(
            model_options(
                ensure("qwen2_vl"),
                f"--allowed-local-media-path:{folder}",
                DType="float32",
                LimitVideoPerPrompt=2,
                LimitImagePerPrompt=1,
            )
        )
        assert result.success, result.message
        yield backend
        assert SECRET not in backend.stderr
        assert b64(DAWN)[:200] not in backend.stderr


def test_it_sees_what_changes(watching: Backend) -> None:
    dawn = said(watching, seen(b64(DAWN)))
    assert said(watching, seen(b64(DUSK))) != dawn
    assert said(watching, seen(b64(DAWN))) == dawn
    assert said(watching, seen()) != dawn


def test_streamed_is_whole(watching: Backend) -> None:
    replies = watching.stream(seen(b64(DAWN)))
    check_shape(replies)
    whole = answer(watching, seen(b64(DAWN)))
    assert content(replies) == whole.message.decode()
    assert replies[-1].prompt_tokens == whole.prompt_tokens


def test_tokens_by_length(watching: Backend) -> None:
    # Two of five frames a second, four at least; every two of them are as many tokens as the size gives.
    text = prompt_tokens(watching, seen())
    tokens = {count: prompt_tokens(watching, seen(frames(count))) - text for count in (4, 10, 20, 40, 80)}
    assert tokens[4] == tokens[10]
    assert tokens[4] < tokens[20] < tokens[40] < tokens[80]
    assert tokens[80] - tokens[40] == 2 * (tokens[40] - tokens[20])
    assert prompt_tokens(watching, seen(frames(20), frames(40))) - text == tokens[20] + tokens[40]
    assert watching.call("TokenizeString", seen(frames(20))).length == text + tokens[20]


def test_forms_of_one_video(watching: Backend, folder: Path) -> None:
    dawn = said(watching, seen(b64(DAWN)))
    for form in (
        f"data:video/x-msvideo;base64,{b64(DAWN)}",
        f"data:video/jpeg;base64,{b64(DAWN)}",
        str(folder / "dawn.avi"),
    ):
        assert said(watching, seen(form)) == dawn


def test_other_containers(watching: Backend) -> None:
    tokens = prompt_tokens(watching, seen(b64(DAWN)))
    assert prompt_tokens(watching, seen(b64(video(BRIGHTER, codec="mp4v", suffix="mp4")))) == tokens
    assert said(watching, seen(picture("red", "GIF", "blue", "green", "white"))) != said(
        watching, seen(picture("white", "GIF", "green", "blue", "red"))
    )


def test_order_and_place(watching: Backend) -> None:
    dawn, dusk = b64(DAWN), b64(DUSK)
    assert said(watching, seen(dawn, dusk)) != said(watching, seen(dusk, dawn))
    assert said(watching, seen(dawn, dusk, text="[vid-1][vid-0]one")) == said(watching, seen(dusk, dawn, text="one"))
    assert said(watching, seen(dawn, text="one[vid-0]")) != said(watching, seen(dawn, text="one"))


def test_beside_an_image(watching: Backend) -> None:
    red, blue = (said(watching, seen(b64(DAWN), Images=[picture(name)])) for name in ("red", "blue"))
    assert red != blue
    marked = raw("<__media__>[vid-0]What?", Images=[picture("red")], Videos=[b64(DAWN)])
    own = f"<|vision_start|><|image_pad|><|vision_end|>{OWN}What?"
    assert said(watching, marked) == said(watching, raw(own, Images=[picture("red")], Videos=[b64(DAWN)]))


def test_raw_prompt(watching: Backend) -> None:
    dawn, dusk = b64(DAWN), b64(DUSK)
    own = said(watching, raw(f"user: {OWN} What?", Videos=[dawn]))
    assert said(watching, raw("user: [vid-0] What?", Videos=[dawn])) == own
    assert said(watching, raw("user: [vid-0] What?", Videos=[dusk])) != own
    assert said(watching, raw("What?", Videos=[dawn])) == said(watching, raw(f"{OWN}What?", Videos=[dawn]))
    # The marker's number counts, whatever the place.
    assert said(watching, raw("[vid-1] then [vid-0]?", Videos=[dawn, dusk])) == said(
        watching, raw(f"{OWN} then {OWN}?", Videos=[dusk, dawn])
    )
    bare = raw("<|video_pad|>What?", Videos=[dawn])
    assert watching.call("TokenizeString", bare).length == prompt_tokens(watching, bare)


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ("", "Videos[1]: is empty"),
        ("data:video/mp4;base64,", "Videos[1]: is empty"),
        ("not base64 at all!", "Videos[1]: is not valid base64"),
        (SECRET, "Videos[1]: can't be decoded"),
        (b64(b"\0\0\0\x20ftypisom" + b"secret" * 40), "Videos[1]: can't be decoded"),
        (picture("red"), "Videos[1]: holds image/png"),
        (b64(DAWN[:100]), "Videos[1]: can't be decoded"),
        (b64(DAWN[: len(DAWN) // 2]), "Videos[1]: can't be decoded"),
        (b64(DAWN[: DAWN.index(b"movi") + 4]), "Videos[1]: has no frame"),
        (frames(1), "Videos[1]: has too few frames"),
        (b64(video(BRIGHTER, (300, 300))), "Videos[1]: Video frame dimensions 300x300"),
        (b64(video([0] * 80, (250, 250))), "Videos[1]: has 32 frames of 250x250 pixels"),
        (b64(video(BRIGHTER, (1000, 2))), "Videos: the model's processor can't take them"),
        ("/etc/passwd", "Videos[1]: is a path outside"),
        ("{}/../outside.avi", "Videos[1]: is a path outside"),
        ("{}/none.avi", "Videos[1]: is the path of no regular file"),
        ("{}/empty.avi", "Videos[1]: can't be decoded"),
        ("https://example.com/a.mp4?token=" + SECRET, "Videos[1]: is a URL"),
    ],
    ids=lambda value: value[:40],
)
@pytest.mark.parametrize("form", [seen, lambda *videos: raw("What?", Videos=videos)], ids=["chat", "raw"])
def test_bad_video(watching: Backend, folder: Path, clip: str, words: str, form: Any) -> None:
    clip = clip.replace("{}", str(folder))
    details = refused(watching, form(b64(DAWN), clip))
    assert details.startswith(words), details
    assert said(watching, seen(b64(DAWN)))


def test_a_header_that_promises_too_many_frames(watching: Backend) -> None:
    # The two places of an AVI that have the number; what is there counts.
    lying = bytearray(DAWN)
    for offset in (lying.index(b"avih") + 8 + 16, lying.index(b"strh") + 8 + 32):
        lying[offset : offset + 4] = (2**31 - 1).to_bytes(4, "little")
    for data in (lying, lying[: lying.index(b"idx1")]):
        assert said(watching, seen(b64(bytes(data)))) == said(watching, seen(b64(DAWN)))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (seen(*[b64(DAWN)] * 3), "Videos: At most 2 video(s)"),
        (raw("What?", Videos=[b64(DAWN)] * 3), "Videos: At most 2 video(s)"),
        (seen(Audios=[b64(b"RIFF\0\0\0\0WAVEfmt ")]), "Audios: At most 0 audio(s)"),
        (raw("<|video_pad|>", Videos=[b64(DAWN)] * 2), "Videos: the prompt must hold"),
    ],
    ids=["chat", "raw", "sound", "placeholders"],
)
def test_videos_that_do_not_fit(watching: Backend, request_: Any, words: str) -> None:
    assert refused(watching, request_).startswith(words)
    assert said(watching, seen(b64(DAWN)))


def test_many_at_once(watching: Backend) -> None:
    dawn = said(watching, seen(b64(DAWN)))
    with watching.connection() as stub:
        good = [stub.Predict.future(seen(b64(DAWN)), timeout=60) for _ in range(8)]
        bad = [stub.Predict.future(seen(SECRET), timeout=60) for _ in range(8)]
        assert [future.result().message.decode() for future in good] == [dawn] * 8
        assert {str(future.code()) for future in bad} == {"StatusCode.INVALID_ARGUMENT"}
