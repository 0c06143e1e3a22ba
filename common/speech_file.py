"""The audio file that a request names -> clips as long as the model can hear at a time. Blocks."""

import contextlib
import io
import os
import stat
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from vllm import envs
from vllm.config import SpeechToTextConfig
from vllm.multimodal.audio import AudioResampler, split_audio
from vllm.multimodal.media import AudioMediaIO
from vllm.multimodal.media.audio import load_audio_pyav

from common.errors import InvalidRequest
from common.media_connector import refusals
from common.media_kinds import FFMPEG_FORMATS, check_kind

# Samples, and their rate.
Loaded = tuple[npt.NDArray[Any], float]

FIELD = "dst"
SECOND = 1_000_000_000  # in the unit of all times here
_SHOWN = 256  # characters of a path in an error


@dataclass(frozen=True)
class Clip:
    """A stretch of a file.

    Attributes:
        samples: of one channel, at the model's rate.
        start: in nanoseconds from the start of the file.
        end: likewise.

    """

    samples: npt.NDArray[np.float32]
    start: int
    end: int


def clips(path: str, config: SpeechToTextConfig) -> list[Clip]:
    """The file in one clip or, where it is longer than the model hears at a time, cut where it is quiet.

    Raises:
        InvalidRequest: there is no such file, it is no regular one, it is too large, or no sound can be made of it.
        Unsupported: vLLM's extra `audio` is not installed.

    """
    rate = int(config.sample_rate)
    samples = _decoded(_read(path), rate)
    pieces = [samples]
    if config.allow_audio_chunking and len(samples) > config.max_audio_clip_s * rate:
        pieces = split_audio(
            samples,
            sample_rate=rate,
            max_clip_duration_s=config.max_audio_clip_s,
            overlap_duration_s=config.overlap_chunk_second,
            min_energy_window_size=config.min_energy_split_window_size,
        )
    ends = np.cumsum([len(piece) for piece in pieces])
    times = [0, *(int(end) * SECOND // rate for end in ends)]
    return [Clip(*parts) for parts in zip(pieces, times, times[1:], strict=False)]


def _read(path: str) -> bytes:
    limit = int(envs.VLLM_MAX_AUDIO_CLIP_FILESIZE_MB) * 2**20
    if not os.path.isabs(path):
        raise InvalidRequest(FIELD, "must be the absolute path of an audio file")
    try:
        # Not opened to find out: opening a device can do something.
        _check_kind(os.stat(path))
        with open(path, "rb", opener=_open) as file:
            _check_kind(status := os.fstat(file.fileno()))
            if not status.st_size:
                raise InvalidRequest(FIELD, "is an empty file")
            data = file.read(limit + 1) if status.st_size <= limit else b""
            size = max(status.st_size, len(data))
    except FileNotFoundError:
        raise InvalidRequest(FIELD, f"there is no file {path[:_SHOWN]!r} on this machine") from None
    except OSError as error:
        raise InvalidRequest(FIELD, f"can't be read ({error.strerror})") from None
    except ValueError:
        raise InvalidRequest(FIELD, "is no path") from None  # it has a NUL
    if size > limit:
        raise InvalidRequest(FIELD, f"has {size} bytes; {limit} are allowed (VLLM_MAX_AUDIO_CLIP_FILESIZE_MB)")
    return data


def _open(path: str, flags: int) -> int:
    # What was a file may be a FIFO by now, which would wait for its other end.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidRequest(FIELD, "is the path of no regular file")


def _decoded(data: bytes, rate: int) -> npt.NDArray[np.float32]:
    with refusals(FIELD):
        samples, own_rate = _loaded(data, rate)
        if not np.isfinite(samples).all():
            raise InvalidRequest(FIELD, "has samples that are no numbers")
        if own_rate != rate:
            samples = AudioResampler(rate, method="soxr").resample(samples, orig_sr=own_rate)
        if not len(samples):
            raise InvalidRequest(FIELD, "holds no sound")
        return np.asarray(samples, np.float32)


def _loaded(data: bytes, rate: int) -> Loaded:
    """One channel, and its rate; by libsndfile or, what that doesn't know, by FFmpeg."""
    import av
    import soundfile

    check_kind(FIELD, data, "audio")
    with contextlib.suppress(soundfile.LibsndfileError):
        return cast("Loaded", AudioMediaIO(audio_backend="soundfile").load_bytes(data))
    # vLLM's reader would take all that FFmpeg knows.
    with av.open(io.BytesIO(data), options={"format_whitelist": FFMPEG_FORMATS}) as container:
        rates = {stream.rate for stream in container.streams.audio}
    # Only where it resamples does vLLM make one channel of floats of what a codec gives.
    loaded = load_audio_pyav(
        io.BytesIO(data),
        sr=2 * rate if rate in rates else rate,
        max_duration_s=envs.VLLM_MAX_AUDIO_DECODE_DURATION_S,
        max_decode_bytes=envs.VLLM_MAX_AUDIO_DECODE_BYTES,
    )
    return cast("Loaded", loaded)
