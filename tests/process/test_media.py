"""Images through a real engine: the model sees them, where they belong, and what is no image harms nobody."""

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from common.pb import backend_pb2 as pb
from tests.models import ensure, torchvision
from tests.process import media
from tests.process.media import INVALID, SECRET, b64, options, refused, said
from tests.process.orchestrator import Backend
from tests.process.wire import check_shape, content, model_options


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def colour(name: str, size: tuple[int, int] = (64, 64), kind: str = "PNG") -> str:
    return b64(encoded(Image.new("RGB", size, name), kind))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header promises side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


RED, BLUE = colour("red"), colour("blue")
NOISE = encoded(Image.effect_noise((64, 64), 90))


def chat(*images: str, text: str = "What is this?", **fields: Any) -> pb.PredictOptions:
    return media.chat(text, Images=images, **fields)


def raw(prompt: str, *images: str) -> pb.PredictOptions:
    return media.raw(prompt, Images=images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files a request may name."""
    folder = tmp_path_factory.mktemp("allowed media")
    (folder / "red.png").write_bytes(base64.b64decode(RED))
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder.parent / "outside.png").write_bytes(base64.b64decode(RED))
    return folder


@pytest.fixture(scope="module")
def seeing(folder: Path) -> Iterator[Backend]:
    """A server with the toy LLaVA in it, which takes two images."""
    with Backend(env={"PYTHONPATH": torchvision.python_path()}) as backend:
        backend.wait_for_health()
        result = backend.load(
            model_options(
                ensure("llava"), f"--allowed-local-media-path:{folder}", DType="float32", LimitImagePerPrompt=2
            )
        )
        assert result.success, result.message
        yield backend
        assert SECRET not in backend.stderr
        assert RED[:60] not in backend.stderr


def test_it_sees(seeing: Backend) -> None:
    red, blue = said(seeing, chat(RED)), said(seeing, chat(BLUE))
    assert red != blue
    assert said(seeing, chat(RED)) == red
    assert said(seeing, chat()) not in (red, blue)


@pytest.mark.parametrize("image", [RED, BLUE])
def test_streamed_is_whole(seeing: Backend, image: str) -> None:
    replies = seeing.stream(chat(image))
    check_shape(replies)
    unary: pb.Reply = seeing.call("Predict", chat(image))
    assert content(replies) == unary.message.decode()
    assert replies[-1].prompt_tokens == unary.prompt_tokens
    # Those of the image among them: four patches for one placeholder.
    assert unary.prompt_tokens > seeing.call("Predict", chat()).prompt_tokens + 3


def test_forms_of_one_image(seeing: Backend, folder: Path) -> None:
    red = said(seeing, chat(RED))
    data = base64.b64decode(RED)
    forms = [
        f"data:image/png;base64,{RED}",
        f"DATA:;base64,{RED}",
        base64.encodebytes(data).decode(),
        str(folder / "red.png"),
        f"{folder}/../{folder.name}/red.png",
        b64(encoded(Image.new("RGB", (64, 64), "red"), "BMP")),
        b64(encoded(Image.new("RGBA", (64, 64), "red"))),
        b64(encoded(Image.new("P", (64, 64), 0), "GIF")),
    ]
    assert [said(seeing, chat(form)) for form in forms[:-1]] == [red] * (len(forms) - 1)
    assert said(seeing, chat(forms[-1])) != red


def test_jpeg_is_no_path(seeing: Backend) -> None:
    jpeg = colour("red", kind="JPEG")
    assert jpeg.startswith("/9j/")
    assert said(seeing, chat(jpeg))


def test_order(seeing: Backend) -> None:
    assert said(seeing, chat(RED, BLUE)) != said(seeing, chat(BLUE, RED))


def test_place(seeing: Backend) -> None:
    first, middle = chat(RED, text="<__media__>one two"), chat(RED, text="one<__media__> two")
    assert said(seeing, first) == said(seeing, chat(RED, text="one two"))
    assert said(seeing, first) != said(seeing, middle)


def test_last_message_of_the_user(seeing: Backend) -> None:
    def conversation(*texts: str) -> list[pb.Message]:
        roles = ["system", "user", "assistant", "user"]
        return [pb.Message(role=role, content=text) for role, text in zip(roles, texts, strict=True)]

    unmarked = conversation("Be brief.", "one", "two", "three")
    marked_last = conversation("Be brief.", "one", "two", "<__media__>three")
    marked_first = conversation("Be brief.", "<__media__>one", "two", "three")
    assert said(seeing, chat(RED, Messages=unmarked)) == said(seeing, chat(RED, Messages=marked_last))
    assert said(seeing, chat(RED, Messages=unmarked)) != said(seeing, chat(RED, Messages=marked_first))


def test_raw_prompt(seeing: Backend) -> None:
    red, blue = said(seeing, raw("user: <image> What?", RED)), said(seeing, raw("user: <image> What?", BLUE))
    assert red != blue
    assert content(seeing.stream(raw("user: <image> What?", RED))) == red
    assert said(seeing, raw("user: What? <image>", RED)) != red
    assert said(seeing, raw("user: <image> <image> What?", RED, BLUE)) not in (red, blue)


def test_markers_in_a_raw_prompt(seeing: Backend) -> None:
    assert said(seeing, raw("user: <__media__> What?", RED)) == said(seeing, raw("user: <image> What?", RED))
    # Without any, as the orchestrator's template would have it.
    assert said(seeing, raw("What?", RED)) == said(seeing, raw("<image>What?", RED))
    # A marker without an image is text.
    assert seeing.call("Predict", raw("user: <__media__> What?")).prompt_tokens > 12
    both = said(seeing, raw("<image><image>What?", RED, BLUE))
    for prompt in ("<__media__><__media__>What?", "<image><__media__>What?", "What?"):
        assert said(seeing, raw(prompt, RED, BLUE)) == both, prompt
    # The one that has no marker goes to the front, as in a chat.
    assert said(seeing, raw("<__media__>What?", BLUE, RED)) == both


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png,abc", "base64"),
        ("ftp://example.com/a.png", "is neither"),
        ("not base64 at all!", "is not valid base64"),
        (RED[:-5], "is not valid base64"),
        (SECRET, "is no image of a known format"),
        (f"data:image/png;base64,{SECRET}", "is no image of a known format"),
        (b64(b"%PDF-1.7\n" + b"secret" * 50), "holds application/pdf"),
        (b64(b"RIFF\0\0\0\0WAVEfmt "), "holds audio/wav"),
        (b64(base64.b64decode(RED)[:40]), "is no image of a known format"),
        (b64(NOISE[: len(NOISE) // 2]), "damaged"),
        (b64(encoded(Image.effect_noise((64, 64), 90), "JPEG")[:300]), "damaged"),
        (b64(bomb(8193)), "has 8193x8193 pixels"),
        (b64(bomb(60_000)), "pixels"),
        (b64(bomb(2**31 - 1)), "pixels"),
        ("/etc/passwd", "is a path outside"),
        ("/no/such/file.png", "is a path outside"),
        ("/dev/zero", "is a path outside"),
        ("http://127.0.0.1/a.png", "allowed_media_domains"),
        ("https://example.com/a.png?token=" + SECRET, "allowed_media_domains"),
    ],
)
@pytest.mark.parametrize("form", [chat, lambda *images: raw("<image>" * len(images), *images)])
def test_bad_image(seeing: Backend, image: str, reason: str, form: Any) -> None:
    details = refused(seeing, form(RED, image))
    assert details.startswith("Images[1]: "), details
    assert reason in details
    assert said(seeing, chat(RED))


@pytest.mark.parametrize("path", ["{}/none.png", "{}/out.png", "{}/../outside.png", "{}"])
def test_bad_path(seeing: Backend, folder: Path, path: str) -> None:
    assert refused(seeing, chat(path.format(folder))).startswith("Images[0]: is ")
    assert said(seeing, chat(RED))


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 1), (1, 3), (1, 2000), (2000, 1), (3000, 2000)])
def test_odd_size(seeing: Backend, size: tuple[int, int]) -> None:
    assert said(seeing, chat(colour("red", size)))
    assert said(seeing, raw("<image>", colour("red", size)))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (chat(RED, RED, RED), "Images: At most 2 image(s)"),
        (raw("<image><image><image>", RED, RED, RED), "Images: At most 2 image(s)"),
        (chat(Audios=[b64(b"RIFF\0\0\0\0WAVEfmt ")]), "Audios: At most 0 audio(s)"),
        (options(Prompt="x", Audios=[b64(b"RIFF\0\0\0\0WAVEfmt ")]), "Audios: At most 0 audio(s)"),
        (chat(Videos=["AAAAIGZ0eXBpc29t"]), "Videos: At most 0 video(s)"),
        (raw("<image>" + SECRET, RED, BLUE), "Images: "),
        (chat(RED, Messages=[pb.Message(role="system", content="Hi")]), "Images[0]: there is no message"),
    ],
)
def test_media_that_do_not_fit(seeing: Backend, request_: pb.PredictOptions, words: str) -> None:
    details = refused(seeing, request_)
    assert details.startswith(words), details
    assert said(seeing, chat(RED))


def test_tokenize(seeing: Backend) -> None:
    text = seeing.call("TokenizeString", chat()).length
    seen = seeing.call("TokenizeString", chat(RED)).length
    assert seen == seeing.call("Predict", chat(RED)).prompt_tokens
    assert seen > text
    for prompt in (raw("<image> one two", RED), raw("<__media__> one two", RED)):
        assert seeing.call("TokenizeString", prompt).length == seeing.call("Predict", prompt).prompt_tokens
    with pytest.raises(grpc.RpcError) as raised:
        seeing.call("TokenizeString", chat(SECRET))
    assert raised.value.code() == INVALID


def test_many_at_once(seeing: Backend) -> None:
    red = said(seeing, chat(RED))
    with seeing.connection() as stub:
        good = [stub.Predict.future(chat(RED), timeout=60) for _ in range(8)]
        bad = [stub.Predict.future(chat(SECRET), timeout=60) for _ in range(8)]
        assert [future.result().message.decode() for future in good] == [red] * 8
        assert [future.code() for future in bad] == [INVALID] * 8


def test_model_that_takes_text_only(scripted: Path, seeing: Backend) -> None:
    # One engine at a time.
    assert seeing.load(model_options(scripted)).success
    for request, field in ((chat(RED), "Images"), (raw("x", RED), "Images"), (chat(Audios=["//uQ"]), "Audios")):
        assert refused(seeing, request) == f"{field}: this model takes text only"
    with pytest.raises(grpc.RpcError) as raised:
        seeing.call("TokenizeString", chat(RED))
    assert raised.value.code() == INVALID
    assert seeing.call("Predict", chat()).tokens == 12
