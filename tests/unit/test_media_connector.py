"""What is fetched and decoded, from where, and how each refusal is named; no network, no engine."""

import base64
import io
import re
import socket
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from common import media_readers
from common.engine_args import plan_load
from common.errors import InvalidRequest, Unsupported
from common.media import media_items
from common.media_connector import NO_DOMAIN, Connector
from common.pb import backend_pb2 as pb
from tests.clips import video

PUBLIC, PRIVATE = (
    "93.184.215.14",
    ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "::1", "fd00::1", "100.64.0.1"],
)


def png(width: int = 4, height: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def url(text: str, field: str = "Images") -> str:
    options = pb.PredictOptions()
    getattr(options, field).append(text)
    (item,) = media_items(options)
    return item.url


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def refusal(connector: Any, text: str, field: str = "Images") -> str:
    fetch = {"Images": connector.fetch_image, "Videos": connector.fetch_video, "Audios": connector.fetch_audio}[field]
    with pytest.raises(InvalidRequest) as caught:
        fetch(url(text, field))
    assert caught.value.field == f"{field}[0]"
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_vllm_uses_it() -> None:
    assert isinstance(MEDIA_CONNECTOR_REGISTRY.load("http"), Connector)


async def test_image() -> None:
    for image in (
        Connector().fetch_image(url(b64(png(3, 2)))),
        await Connector().fetch_image_async(url(b64(png(3, 2)))),
    ):
        assert (image.size, image.mode) == ((3, 2), "RGB")
        assert image.original_bytes == png(3, 2)


@given(st.binary(min_size=1, max_size=300))
@example(png()[:60])
@example(b"P6 secretsecretsecret 1 255\n")
@example(b"/* XPM */ secret")
def test_any_bytes_are_an_image_or_refused(data: bytes) -> None:
    try:
        image = Connector().fetch_image(url(b64(data)))
    except InvalidRequest as refused:
        field, text = refused.field, str(refused)
        assert "secret" not in text
        assert field == "Images[0]"
    else:
        assert image.width * image.height > 0


@given(st.binary(max_size=20), st.integers(0, 200))
def test_a_damaged_image_is_an_image_or_refused(patch: bytes, offset: int) -> None:
    data = png(30, 30)
    data = data[:offset] + patch + data[offset + len(patch) :]
    try:
        assert Connector().fetch_image(url(b64(data)))
    except InvalidRequest as refused:
        field = refused.field
        assert field == "Images[0]"


def test_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_readers, "MAX_IMAGE_PIXELS", 20)
    assert refusal(Connector(), b64(png(7, 3))).startswith("Images[0]: has 7x3 pixels; 20 are allowed")
    assert Connector().fetch_image(url(b64(png(5, 4))))
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "30")
    assert Connector().fetch_image(url(b64(png(7, 3))))
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "6")
    assert "6 are allowed" in refusal(Connector(), b64(png(7, 3)))


def image(form: str, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, form, **how)
    return file.getvalue()


def test_formats() -> None:
    moving = {"save_all": True, "append_images": [Image.new("RGB", (64, 64), "blue")]}
    for form in media_readers.IMAGE_FORMATS:
        assert Connector().fetch_image(url(b64(image(form)))).size == (64, 64)
    for form, how in (("GIF", moving), ("MPO", moving), ("TIFF", {"compression": "tiff_lzw"})):
        assert Connector().fetch_image(url(b64(image(form, **how)))).size == (64, 64)


XPM = b'/* XPM */\nstatic char *x[] = {\n"4 4 1 1",\n". c #000000",\n' + b'"....",\n' * 4 + b"};"
# Four pixels, and how many of them are alike: what Pillow decodes in Python.
RUNS = (
    b"BM\x3e\4\0\0\0\0\0\0\x3a\4\0\0\x28\0\0\0\4\0\0\0\1\0\0\0\1\0\x08\0\1\0\0\0\4\0\0\0"
    + bytes(16 + 1028)
    + b"\4\0\0\1"
)


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (image("PPM"), "PPM"),
        (b"P2\n2 2\n255\n0 0 0 0", "PPM"),
        (XPM, "XPM"),
        (RUNS, "BMP"),
        *((image(form), form) for form in ("QOI", "ICO", "DDS", "TGA", "SGI", "PCX", "ICNS")),
    ],
)
def test_formats_that_python_decodes(data: bytes, form: str) -> None:
    """They hold the interpreter, for half a minute at the most pixels, or have another size than the header says."""
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == form
    said = refusal(Connector(), b64(data))
    assert said == (f"Images[0]: holds {form}; use PNG, JPEG, MPO, GIF, WEBP, BMP (uncompressed), TIFF, AVIF, JPEG2000")


def test_paths_are_off() -> None:
    for path in ("/etc/hostname", "/no/such/file"):
        assert "allowed_local_media_path" in refusal(Connector(), path)
        assert path not in refusal(Connector(), path)


def test_paths(tmp_path: Path) -> None:
    folder = tmp_path / "a ü#?%20"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b#c.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to(folder / "sub" / "a b#c.png")
    (folder / "broken.png").write_bytes(png()[:50])
    connector = Connector(allowed_local_media_path=str(folder))
    for good in ("sub/a b#c.png", "inside.png", "sub/../sub/a b#c.png"):
        assert connector.fetch_image(url(f"{folder}/{good}")).size == (4, 4)
    for outside in ("link.png", "../secret.png", "../none.png", "."):
        assert "outside" in refusal(connector, f"{folder}/{outside}")
    assert "no regular file" in refusal(connector, f"{folder}/none.png")
    assert "no regular file" in refusal(connector, f"{folder}/sub")
    assert refusal(connector, f"{folder}/broken.png").startswith("Images[0]: ")
    assert refusal(connector, f"{folder}/a\0b.png").startswith("Images[0]: ")
    assert refusal(connector, "/" + "a" * 300).startswith("Images[0]: ")


class Web:
    """A connection that answers everything with one image, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_bytes(self, url: str, *, timeout: Any, allow_redirects: bool, max_bytes: Any = None) -> bytes:
        assert not allow_redirects
        self.asked.append(url)
        return png()


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (address, 0)) for address in addresses])


async def test_allowed_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, PUBLIC)
    web = Web()
    connector = Connector(connection=web, allowed_media_domains=["pictures.example"])
    assert connector.fetch_image(url("https://pictures.example/a.png?b=c")).size == (4, 4)
    assert (await connector.fetch_image_async(url("HTTP://Pictures.Example:8080/b.png"))).size == (4, 4)
    assert web.asked == ["https://pictures.example/a.png?b=c", "http://pictures.example:8080/b.png"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolve(monkeypatch, PUBLIC, address)
    web = Web()
    connector = Connector(connection=web, allowed_media_domains=["pictures.example"])
    assert "private address" in refusal(connector, "http://pictures.example/a.png")
    assert not web.asked


@pytest.mark.parametrize("domains", [None, [], [NO_DOMAIN], ["pictures.example"]])
@pytest.mark.parametrize(
    "text",
    [
        "http://other.example/a.png?token=secret",
        "http://pictures.example.other.example/",
        "http://pictures.example@other.example/",
        "http://127.0.0.1/",
        "http://[::1]/",
        "http://",
        "http://other.example\\@pictures.example/",
    ],
)
def test_other_domains(domains: list[str] | None, text: str) -> None:
    web = Web()
    details = refusal(Connector(connection=web, allowed_media_domains=domains), text)
    assert "secret" not in details
    assert not web.asked


def test_host_that_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise socket.gaierror(-2, "secret.example")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    connector = Connector(allowed_media_domains=["secret.example"])
    assert refusal(connector, "http://secret.example/") == "Images[0]: can't be fetched or read (gaierror)"


def test_nothing_is_allowed_unless_configured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = str(tmp_path)
    assert plan_load(pb.ModelOptions(Model=model)).engine_args["allowed_media_domains"] == [NO_DOMAIN]
    configured = pb.ModelOptions(Model=model, EngineArgs='{"allowed_media_domains": ["a.example"]}')
    assert plan_load(configured).engine_args["allowed_media_domains"] == ["a.example"]
    with pytest.raises(InvalidRequest, match="allowed_local_media_path"):
        plan_load(pb.ModelOptions(Model=model, Options=["--allowed-local-media-path:/no/such/folder"]))


def test_another_connector_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    assert plan_load(pb.ModelOptions(Model=str(tmp_path)))
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "mine")
    with pytest.raises(InvalidRequest, match="VLLM_MEDIA_CONNECTOR"):
        plan_load(pb.ModelOptions(Model=str(tmp_path)))


def test_video(tmp_path: Path) -> None:
    data = video([0, 80, 160, 240])
    (tmp_path / "a.avi").write_bytes(data)
    connector = Connector(allowed_local_media_path=str(tmp_path))
    for form in (b64(data), f"data:video/jpeg;base64,{b64(data)}", str(tmp_path / "a.avi")):
        frames, metadata = connector.fetch_video(url(form, "Videos"))
        assert frames.shape == (4, 32, 32, 3)
        assert metadata["total_num_frames"] == 4
    for damaged in (data[:100], b"secret" * 20):
        assert "secret" not in refusal(Connector(), b64(damaged), "Videos")
    without_frames = data[: data.index(b"movi") + 4]
    assert refusal(Connector(), b64(without_frames), "Videos") == "Videos[0]: has no frame that can be decoded"


def test_a_list_of_pictures_is_no_video() -> None:
    picture = b64(b"P6 1 1 255\n" + b"abc")
    assert "base64" in refusal(Connector(), f"data:video/jpeg;base64,{picture},{picture}", "Videos")


def test_pixels_of_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b64(video(range(20)))
    monkeypatch.setattr(media_readers, "MAX_IMAGE_PIXELS", 32 * 32 * 20 // 16)
    assert Connector().fetch_video(url(data, "Videos"))[0].shape[0] == 20
    monkeypatch.setattr(media_readers, "MAX_IMAGE_PIXELS", 32 * 32 * 19 // 16)
    said = refusal(Connector(), data, "Videos")
    assert said.startswith("Videos[0]: has 20 frames of 32x32 pixels to look at; 19456 pixels are allowed")
    assert Connector({"video": {"num_frames": 19}}).fetch_video(url(data, "Videos"))[0].shape[0] == 19
    monkeypatch.setattr(media_readers, "MAX_IMAGE_PIXELS", 1000)
    assert refusal(Connector(), data, "Videos").startswith("Videos[0]: has frames of 32x32 pixels; 1000 are allowed")
    for limit in ("1000", "0"):
        monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", limit)
        if limit == "0":
            assert Connector().fetch_video(url(data, "Videos"))[0].shape[0] == 20
        else:
            assert "VLLM_MAX_IMAGE_PIXELS" in refusal(Connector(), data, "Videos")


def far_video(last: int) -> bytes:
    """A video of eight frames in a kilobyte, the last of which is the number `last`."""
    av = pytest.importorskip("av", reason="vLLM's extra `audio` is not installed")
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuv420p", 1
        for number in (0, 1, 2, 3, last - 300, last - 200, last - 100, last):
            frame = av.VideoFrame(64, 64, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", ["opencv", "opencv_dynamic", "qwen3_vl", "glm5next", "molmo2", "openpangu"])
def test_frames_that_only_a_header_claims(backend: str) -> None:
    """Each that is asked for takes time: these would take minutes, and there could be a billion."""
    connector = Connector({"video": {"video_backend": backend}})
    said = refusal(connector, b64(far_video(5_000_000)), "Videos")
    assert re.fullmatch(r"Videos\[0\]: has \d{7} frames; 100000 are allowed", said)


def test_a_long_video() -> None:
    frames, metadata = Connector().fetch_video(url(b64(far_video(20_000)), "Videos"))
    assert len(frames) > 0
    assert metadata["total_num_frames"] > 19_000


def test_too_few_frames_for_a_model() -> None:
    connector = Connector({"video": {"video_backend": "qwen2_vl"}})
    assert connector.fetch_video(url(b64(video([0, 9])), "Videos"))[0].shape[0] == 2
    assert refusal(connector, b64(video([0])), "Videos") == "Videos[0]: has too few frames for this model"


def test_audio() -> None:
    wav = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x80\x3e\0\0\0\x7d\0\0\2\0\x10\0data\x08\0\0\0" + b"\0\x20" * 4
    try:
        samples, rate = Connector().fetch_audio(url(b64(wav), "Audios"))
    except Unsupported as unsupported:
        text = str(unsupported)
        assert text.startswith("Audios[0]: ")
        assert "audio" in text
    else:
        assert (list(samples), rate) == ([0.25] * 4, 16000)
        assert "secret" not in refusal(Connector(), b64(b"secret" * 20), "Audios")
        assert refusal(Connector(), b64(wav[:40] + bytes(4)), "Audios") == "Audios[0]: holds no sound"
