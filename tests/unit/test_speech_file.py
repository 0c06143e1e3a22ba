import contextlib
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

soundfile = pytest.importorskip("soundfile", reason="vLLM's extra `audio` is not installed")

from vllm.config import SpeechToTextConfig  # noqa: E402

from common.errors import InvalidRequest  # noqa: E402
from common.speech_file import SECOND, Clip, clips  # noqa: E402
from tests.clips import sound  # noqa: E402

RATE = 16_000
WHISPER = SpeechToTextConfig()
Samples = npt.NDArray[np.float32]


def tone(seconds: float, rate: int = RATE) -> Samples:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: npt.NDArray[Any], rate: int = RATE, **form: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **form)
    return file.getvalue()


def ffmpeg(samples: npt.NDArray[Any], rate: int, codec: str = "aac", form: str = "mp4", layout: str = "mono") -> bytes:
    """What only FFmpeg reads; `samples` in the codec's own format and shape."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        kinds = {"f": "fltp", "i": "s16p" if codec == "alac" else "s16"}
        frame = av.AudioFrame.from_ndarray(samples, format=kinds[samples.dtype.kind], layout=layout)
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def integers(rate: int) -> npt.NDArray[np.int16]:
    return (tone(2, rate) * 2**15).astype(np.int16)


def read(path: Path | str, config: SpeechToTextConfig = WHISPER) -> list[Clip]:
    return clips(str(path), config)


def refused(path: Path | str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read(path)
    assert caught.value.field == "dst"
    return str(caught.value)


FORMS: dict[str, Callable[[], bytes]] = {
    "a.wav": lambda: encoded(tone(2), format="WAV", subtype="PCM_16"),
    "b.wav": lambda: encoded(tone(2), format="WAV", subtype="FLOAT"),
    "c.wav": lambda: encoded(np.stack([tone(2, 44_100)] * 2, 1), 44_100, format="WAV", subtype="PCM_24"),
    "d.wav": lambda: encoded(tone(2, 8000), 8000, format="WAV", subtype="ULAW"),
    "e.flac": lambda: encoded(tone(2, 48_000), 48_000, format="FLAC"),
    "f.mp3": lambda: encoded(tone(2, 44_100), 44_100, format="MP3"),
    "g.ogg": lambda: encoded(tone(2), format="OGG", subtype="VORBIS"),
    "h.opus": lambda: encoded(tone(2, 48_000), 48_000, format="OGG", subtype="OPUS"),
    "i.m4a": lambda: ffmpeg(tone(2, 48_000)[None], 48_000),
    "j.m4a": lambda: ffmpeg(tone(2)[None], RATE),
    "k.m4a": lambda: ffmpeg(integers(44_100)[None], 44_100, "alac"),
    "l.m4a": lambda: ffmpeg(integers(RATE)[None], RATE, "alac"),
    "m.mkv": lambda: ffmpeg(np.repeat(integers(RATE), 2)[None], RATE, "pcm_s16le", "matroska", "stereo"),
    "n.mkv": lambda: ffmpeg(np.repeat(integers(44_100), 2)[None], 44_100, "pcm_s16le", "matroska", "stereo"),
    "name without an extension": lambda: encoded(tone(2), format="FLAC"),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(FORMS[name]())
    (clip,) = read(file)
    assert clip.samples.dtype == np.float32
    assert clip.samples.ndim == 1
    # Codecs add some at the ends.
    assert abs(len(clip.samples) - 2 * RATE) < 0.15 * RATE
    assert (clip.start, clip.end) == (0, len(clip.samples) * SECOND // RATE)
    # It is the tone, wherever the codec began.
    spectrum = np.abs(np.fft.rfft(clip.samples[: 2 * RATE]))
    assert abs(spectrum.argmax() * RATE / len(clip.samples[: 2 * RATE]) - 440) < 2
    assert 0.25 < np.abs(clip.samples).max() < 0.45


def test_lossless(tmp_path: Path) -> None:
    samples = tone(1.5)
    (tmp_path / "a.wav").write_bytes(encoded(samples, format="WAV", subtype="FLOAT"))
    (clip,) = read(tmp_path / "a.wav")
    np.testing.assert_array_equal(clip.samples, samples)


def test_a_long_file_is_cut_where_it_is_quiet(tmp_path: Path) -> None:
    samples = tone(70)
    samples[round(29.3 * RATE) : round(29.6 * RATE)] = 0
    samples[round(58.9 * RATE) : round(59.1 * RATE)] *= 0.01
    (tmp_path / "a.wav").write_bytes(encoded(samples, format="WAV", subtype="FLOAT"))
    found = read(tmp_path / "a.wav")
    np.testing.assert_array_equal(np.concatenate([clip.samples for clip in found]), samples)
    assert [clip.start for clip in found] == [0, *(clip.end for clip in found[:-1])]
    assert found[-1].end == 70 * SECOND
    assert all(len(clip.samples) <= 30 * RATE for clip in found)
    first, second, last = found
    assert 29.3 <= first.end / SECOND <= 29.6
    assert 58.85 <= second.end / SECOND <= 59.1
    assert last.end - last.start == 70 * SECOND - last.start


def test_no_cut(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(tone(40), format="WAV", subtype="PCM_16"))
    (clip,) = read(tmp_path / "a.wav", SpeechToTextConfig(max_audio_clip_s=None, min_energy_split_window_size=None))
    assert clip.end == 40 * SECOND
    (tmp_path / "a.wav").write_bytes(encoded(tone(30), format="WAV", subtype="PCM_16"))
    assert len(read(tmp_path / "a.wav")) == 1


def wav_header(offset: int, value: int, size: int = 4) -> bytes:
    wav = bytearray(sound(1))
    wav[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(wav)


SECRET = b"my diary, of no use to others. "


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is an empty file"),
        (SECRET * 40, "can't be decoded"),
        (b"ID3" + SECRET * 40, "can't be decoded"),
        (b"RIFF" + SECRET * 40, "can't be decoded"),
        (b"fLaC" + SECRET * 40, "can't be decoded"),
        (b"OggS" + SECRET * 40, "can't be decoded"),
        (b"\x89PNG\r\n\x1a\n" + SECRET * 40, "can't be decoded"),
        (sound(1)[:20], "can't be decoded"),
        (sound(1)[:44], "holds no sound"),
        (sound(0), "holds no sound"),
        (wav_header(24, 0), "can't be decoded"),
        (wav_header(24, 1), "Audio exceeds maximum allowed duration of 600s"),
        (wav_header(24, 2**32 - 1), "can't be decoded"),
        (wav_header(24, 2**31 - 1), "holds no sound"),
        (wav_header(22, 65_535, size=2), "can't be decoded"),
        (encoded(np.full(RATE, np.nan, np.float32), format="WAV", subtype="FLOAT"), "has samples that are no numbers"),
        (encoded(np.full(RATE, np.inf, np.float32), format="WAV", subtype="FLOAT"), "has samples that are no numbers"),
        (sound(1)[:40] + struct.pack("<I", 700 * 32_000) + bytes(700 * 32_000), "Audio exceeds maximum allowed"),
        (sound(1) + bytes(25 * 2**20), f"has {len(sound(1)) + 25 * 2**20} bytes; {25 * 2**20} are allowed"),
    ],
)
def test_bad_files(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "clip.wav"
    file.write_bytes(data)
    reason = refused(file)
    assert reason.startswith(f"dst: {words}"), reason
    assert "diary" not in reason


@pytest.mark.parametrize("name", ["a.wav", "e.flac", "f.mp3", "g.ogg", "i.m4a"])
def test_truncated(tmp_path: Path, name: str) -> None:
    """What is there is heard, or the file is refused; nothing else."""
    file = tmp_path / name
    data = FORMS[name]()
    file.write_bytes(data[: round(0.9 * len(data))])
    if name in ("a.wav", "f.mp3"):
        (clip,) = read(file)
        assert 1.5 * SECOND < clip.end < 2 * SECOND
    for share in (0.02, 0.3, 0.5, 0.9):
        file.write_bytes(data[: round(share * len(data))])
        with contextlib.suppress(InvalidRequest):
            assert sum(len(clip.samples) for clip in read(file)) < 2.1 * RATE


def test_a_header_that_promises_gigabytes(tmp_path: Path) -> None:
    for size in (2**31 - 1, 2**32 - 1):
        (tmp_path / "a.wav").write_bytes(wav_header(40, size))
        (clip,) = read(tmp_path / "a.wav")
        assert clip.end == SECOND


def test_limits_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.wav"
    file.write_bytes(sound(3))
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", "2")
    assert "maximum allowed duration of 2s" in refused(file)
    assert "VLLM_MAX_AUDIO_DECODE_DURATION_S" in refused(file)
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_DURATION_S", "600")
    monkeypatch.setenv("VLLM_MAX_AUDIO_DECODE_BYTES", "1000")
    assert "VLLM_MAX_AUDIO_DECODE_BYTES" in refused(file)
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "0")
    assert refused(file) == f"dst: has {len(sound(3))} bytes; 0 are allowed (VLLM_MAX_AUDIO_CLIP_FILESIZE_MB)"


@pytest.mark.timeout(20)
def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "link", "/dev/null", "/dev/zero", "/dev/tty"):
        assert refused(path) == "dst: is the path of no regular file"
    assert refused(tmp_path / "none.wav") == f"dst: there is no file '{tmp_path}/none.wav' on this machine"
    assert refused(tmp_path / "loop").startswith("dst: can't be read (")
    assert refused(tmp_path / "fifo" / "a").startswith("dst: can't be read (")
    assert refused("/" + "a" * 5000).startswith("dst: can't be read (")
    assert refused("/tmp/a\0b") == "dst: is no path"
    # The kernel's files have no size.
    assert refused("/proc/self/environ") == "dst: is an empty file"
    for path in ("", "clip.wav", "../clip.wav", "file:///tmp/clip.wav", "http://localhost/clip.wav"):
        assert refused(path) == "dst: must be the absolute path of an audio file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(sound(1))
    (tmp_path / "a.wav").chmod(0)
    assert refused(tmp_path / "a.wav") == "dst: can't be read (Permission denied)"


def test_a_link_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(sound(1))
    (tmp_path / "link.wav").symlink_to("a.wav")
    (clip,) = read(tmp_path / "link.wav")
    assert clip.end == SECOND


def test_a_fifo_in_place_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a file a moment ago."""
    os.mkfifo(tmp_path / "a.wav")
    was = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda *_args, **_kwargs: was)
    assert refused(tmp_path / "a.wav") == "dst: is the path of no regular file"


def test_no_line_of_a_missing_decoder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.wav").write_bytes(sound(1))
    read(tmp_path / "a.wav")
    assert not caplog.records
