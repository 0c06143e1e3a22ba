"""What media begin like, and what FFmpeg never gets to see: formats that make it open other files, or listen."""

import base64
import io
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="vLLM's extra `audio` is not installed")

from vllm.config import SpeechToTextConfig  # noqa: E402

from common.errors import InvalidRequest  # noqa: E402
from common.media import media_items  # noqa: E402
from common.media_connector import Connector  # noqa: E402
from common.media_kinds import check_kind, fits, sniff  # noqa: E402
from common.pb import backend_pb2 as pb  # noqa: E402
from common.speech_file import clips  # noqa: E402
from tests.clips import picture, sound, video  # noqa: E402
from tests.unit.test_media import BEGINNINGS  # noqa: E402

CONCAT = b"ffconcat version 1.0\nfile 'other.wav'\nfile 'other.wav'\n" + b"# \n" * 20
SDP = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\nm=audio 45678 RTP/AVP 0\r\n"
HLS = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:9.0,\nhttp://127.0.0.1:PORT/a.ts\n#EXT-X-ENDLIST\n"
DASH = (
    b'<?xml version="1.0"?><MPD type="static" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>'
    b'<AdaptationSet mimeType="audio/mp4"><Representation id="1"><BaseURL>http://127.0.0.1:PORT/a.mp4</BaseURL>'
    b"</Representation></AdaptationSet></Period></MPD>"
)
TEXTS = {
    "ffconcat": CONCAT,
    "SDP": SDP,
    "HLS": HLS,
    "DASH": DASH,
    "ffconcat behind a tag of MP3": b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + CONCAT,
    "SDP behind a frame of MP3": b"\xff\xfb\x90\x64\r\n" + SDP,
    "DASH behind a frame of MP3": b"\xff\xfb\x90\x64\r\n" + DASH,
    "SDP in FLAC": b"fLaC\r\n" + SDP,
    "SDP in FLV": b"FLV\1\r\n" + SDP,
    "SDP in MP4": b"abcdftyp\r\n" + SDP,
    "DASH in MP4": b"abcdmdat\r\n" + DASH,
}
FORMS = {
    "adts": "aac",
    "aiff": "pcm_s16be",
    "caf": "pcm_s16le",
    "flv": "aac",
    "mpegts": "aac",
    "mpeg": "mp2",
    "mp2": "mp2",
    "mp3": "libmp3lame",
    "ogg": "libopus",
    "flac": "flac",
    "wav": "pcm_s16le",
    "w64": "pcm_s16le",
    "mp4": "aac",
    "mov": "pcm_s16le",
    "3gp": "aac",
    "matroska": "pcm_s16le",
    "webm": "libopus",
    "avi": "pcm_s16le",
    "au": "pcm_s16be",
    "amr": "libopencore_amrnb",
    "wv": "wavpack",
}
VIDEOS = {"mp4": "mp4v", "mov": "mp4v", "mkv": "mp4v", "avi": "MJPG", "flv": "FLV1", "wmv": "WMV2", "ts": "mp4v"}
RATES = {"libopencore_amrnb": 8000, "libopus": 48_000}


def encoded(form: str) -> bytes:
    """A second of a tone."""
    codec = FORMS[form]
    rate = RATES.get(codec, 16_000)
    kind = next(iter(av.Codec(codec, "w").audio_formats)).name
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    frame = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
    frame.sample_rate = rate
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        resampler = av.AudioResampler(kind, "mono", rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), None]:
            container.mux(stream.encode(piece))
    return file.getvalue()


def fetch(field: str, text: str, folder: Path) -> None:
    options = pb.PredictOptions()
    getattr(options, field).append(text)
    connector = Connector(allowed_local_media_path=str(folder))
    (item,) = media_items(options)
    assert (connector.fetch_audio if field == "Audios" else connector.fetch_video)(item.url)


def hear(file: Path) -> None:
    assert clips(str(file), SpeechToTextConfig())


@pytest.mark.parametrize("data", BEGINNINGS)
def test_sniff(data: bytes) -> None:
    kind = sniff(data)
    assert kind is not None
    assert kind.partition("/")[0] in ("image", "video", "audio", "application")


@pytest.mark.parametrize("data", [b"", b"\0" * 20, b"hello", b"RIFF\0\0\0\0", b"\xff\xff\xff", b"GGG", CONCAT, HLS])
def test_sniff_what_is_unknown(data: bytes) -> None:
    assert sniff(data) is None


def test_fits() -> None:
    assert fits("video/mp4", "audio")
    assert fits("audio/ogg", "video")
    assert fits("image/gif", "video")
    assert not fits("image/png", "video")
    assert not fits("audio/flac", "video")
    assert not fits("image/gif", "audio")
    assert not fits("application/pdf", "image")


@pytest.fixture
def asked() -> Iterator[list[str]]:
    """What was fetched from `PORT` of this machine."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        paths.append(str(server.server_port))
        yield paths
        server.shutdown()
        thread.join()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TEXTS)
def test_what_would_have_ffmpeg_open_something(
    name: str, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.wav").write_bytes(sound(1))
    data = TEXTS[name].replace(b"PORT", asked.pop().encode())
    (tmp_path / "text").write_bytes(data)
    for text in (base64.b64encode(data).decode(), str(tmp_path / "text")):
        for field in ("Audios", "Videos"):
            with pytest.raises(InvalidRequest, match=rf"^{field}\[0\]: (can't be decoded|holds)"):
                fetch(field, text, tmp_path)
    with pytest.raises(InvalidRequest, match=r"^dst: can't be decoded"):
        hear(tmp_path / "text")
    assert not asked


@pytest.mark.parametrize("form", FORMS)
def test_sounds(form: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data := encoded(form))
    fetch("Audios", base64.b64encode(data).decode(), tmp_path)
    fetch("Audios", str(tmp_path / "a"), tmp_path)
    hear(tmp_path / "a")


@pytest.mark.parametrize("suffix", VIDEOS)
def test_videos(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(data := video(range(0, 250, 10), codec=VIDEOS[suffix], suffix=suffix))
    fetch("Videos", base64.b64encode(data).decode(), tmp_path)
    fetch("Videos", str(tmp_path / "a"), tmp_path)


def test_kinds_of_other_fields(tmp_path: Path) -> None:
    for field, data in (("Audios", picture("red")), ("Videos", picture("red")), ("Videos", sound(1))):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InvalidRequest, match=rf"^{field}\[0\]: can't be decoded; it may be damaged, or is no "):
            fetch(field, str(tmp_path / "a"), tmp_path)


def test_the_environment_reaches_opencv() -> None:
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"].startswith("format_whitelist;mov,")


def test_check_kind() -> None:
    check_kind("dst", sound(1), "audio")
    with pytest.raises(InvalidRequest, match=r"^dst: can't be decoded; it may be damaged, or is no audio of a known"):
        check_kind("dst", CONCAT, "audio")
