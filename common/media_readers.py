"""vLLM's readers of media, each behind a look at how much it is about to decode.

No text raised here holds anything of a payload.
"""

import base64
import io
import os
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from vllm import envs
from vllm.multimodal.image import open_image
from vllm.multimodal.media import AudioMediaIO, ImageMediaIO, VideoMediaIO

from common import media_memory
from common.errors import InvalidRequest
from common.media_kinds import check_format, check_kind

# What C code decodes, in the size that the header says. Other formats Pillow decodes in Python, which holds the
# interpreter for half a minute at the most pixels, and some hold an image of another size (ICO, ICNS).
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000")
# Of one image, 8192 x 8192, where VLLM_MAX_IMAGE_PIXELS says nothing else: 200 MB as RGB.
MAX_IMAGE_PIXELS = 2**26
# All frames that are taken of one video may have as many pixels as this many images: 3 GB as RGB, 500 frames of 1080p.
VIDEO_IMAGES = 16
# A header may claim any number, and vLLM's reader asks OpenCV for each of them up to the last that it takes, there or
# not: 57 us for one that is not, the time of decoding for one that is. 55 minutes at 30 Hz.
MAX_VIDEO_FRAMES = 100_000
# Of a picture: as it is decoded, and as it is converted, four bytes each in Pillow. Of a frame: as RGB.
_BYTES_PER_PIXEL = 8
_BYTES_PER_FRAME_PIXEL = 3
# OpenCV's CAP_PROP_FRAME_WIDTH and _HEIGHT.
_WIDTH, _HEIGHT = 3, 4


def limited(where: str, reader: Any) -> Any:
    """What reads as vLLM's `reader` does, with limits, and with the name `where` of the field in what it refuses."""
    if isinstance(reader, ImageMediaIO):
        return _Images(where, reader)
    if isinstance(reader, VideoMediaIO):
        return _Videos(where, reader)
    if isinstance(reader, AudioMediaIO):
        return _Audios(where, reader)
    return reader


class _Limited:
    """All that vLLM calls comes through `load_bytes`, whatever the source."""

    def __init__(self, where: str, reader: Any) -> None:
        self._where = where
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    # By the type alone vLLM would take a list of pictures for a video.
    def load_base64(self, _media_type: str, data: str) -> Any:
        return self.load_bytes(base64.b64decode(data, validate=True))

    def load_file(self, path: Path) -> Any:
        return self.load_bytes(path.read_bytes())

    def load_bytes(self, data: bytes) -> Any:
        return self._reader.load_bytes(data)


class _Images(_Limited):
    """A look at the header: format and size are known before anything is decoded."""

    def load_bytes(self, data: bytes) -> Any:
        image = open_image(io.BytesIO(data))
        # BMP has a compression that is decoded in Python.
        if image.format not in IMAGE_FORMATS or any(tile[0] in Image.DECODERS for tile in image.tile):
            names = ", ".join(IMAGE_FORMATS).replace("BMP", "BMP (uncompressed)")
            raise InvalidRequest(self._where, f"holds {image.format}; use {names}")
        limit = _pixel_limit()
        width, height = image.size
        if width * height > limit > 0:
            raise InvalidRequest(
                self._where, f"has {width}x{height} pixels; {limit} are allowed (VLLM_MAX_IMAGE_PIXELS)"
            )
        size = width * height * _BYTES_PER_PIXEL
        media_memory.MEMORY.take(self._where, size, _request_limit())
        try:
            decoded = self._reader.load_bytes(data)
        except BaseException:
            media_memory.MEMORY.give_back(size)
            raise
        media_memory.MEMORY.hold(decoded.media, size)
        return decoded


class _Audios(_Limited):
    """A look at the bytes, also where vLLM would have the decoder open the file."""

    def load_file(self, path: Path) -> Any:
        with path.open("rb") as file:
            return self.load_bytes(file.read(self._reader.get_max_bytes() + 1))

    def load_bytes(self, data: bytes) -> Any:
        check_kind(self._where, data, "audio")
        if len(data) <= self._reader.get_max_bytes():  # else vLLM refuses it
            check_format(self._where, data)
        samples, rate = super().load_bytes(data)
        if not len(samples):
            raise InvalidRequest(self._where, "holds no sound")
        # Nothing says how long it is before it is decoded; vLLM's threads are few, and each stops at a limit.
        media_memory.MEMORY.take(self._where, samples.nbytes, _request_limit())
        media_memory.MEMORY.hold(samples, samples.nbytes)
        return samples, rate


class _Videos(_Limited):
    """A look at the bytes, and at how much is about to be decoded."""

    def __init__(self, where: str, reader: Any) -> None:
        super().__init__(where, reader)
        # The reader is made for this one video.
        self._taken: list[int] = []
        own = {"where": where, "taken": self._taken}
        reader.video_loader = type("_Loader", (_LimitedFrames, type(reader.video_loader)), own)()

    def load_bytes(self, data: bytes) -> Any:
        check_kind(self._where, data, "video")
        try:
            decoded = super().load_bytes(data)
            frames, _ = decoded.media
            while self._taken:
                media_memory.MEMORY.hold(frames, self._taken[-1])
                self._taken.pop()
            return decoded
        finally:
            media_memory.MEMORY.give_back(sum(self._taken))


class _LimitedFrames:
    """What stands before the methods of a loader of vLLM's, which are all the class's."""

    where = ""
    taken: ClassVar[list[int]] = []

    @classmethod
    def compute_frames_index_to_sample(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        if source.total_frames_num > MAX_VIDEO_FRAMES:
            raise InvalidRequest(cls.where, f"has {source.total_frames_num} frames; {MAX_VIDEO_FRAMES} are allowed")
        loader: Any = super()
        try:
            return loader.compute_frames_index_to_sample(source, *args, **kwargs)
        except ZeroDivisionError:
            raise InvalidRequest(cls.where, "has too few frames for this model") from None

    @classmethod
    def read_frames(cls, cap: Any, frame_idx: list[int], *args: Any, **kwargs: Any) -> Any:
        width, height = int(cap.get(_WIDTH)), int(cap.get(_HEIGHT))
        _check_frames(cls.where, width, height, len(frame_idx))
        size = width * height * len(frame_idx) * _BYTES_PER_FRAME_PIXEL
        media_memory.MEMORY.take(cls.where, size, _request_limit())
        cls.taken.append(size)
        loader: Any = super()
        frames, valid = loader.read_frames(cap, frame_idx, *args, **kwargs)
        if not valid:
            raise InvalidRequest(cls.where, "has no frame that can be decoded")
        return frames, valid


def _check_frames(where: str, width: int, height: int, count: int) -> None:
    limit = _pixel_limit()
    if width * height > limit > 0:
        raise InvalidRequest(
            where, f"has frames of {width}x{height} pixels; {limit} are allowed (VLLM_MAX_IMAGE_PIXELS)"
        )
    if width * height * count > limit * VIDEO_IMAGES > 0:
        raise InvalidRequest(
            where,
            f"has {count} frames of {width}x{height} pixels to look at; {limit * VIDEO_IMAGES} pixels are allowed"
            f" ({VIDEO_IMAGES} times VLLM_MAX_IMAGE_PIXELS); the engine argument media_io_kwargs takes fewer frames",
        )


def _request_limit() -> int:
    """Bytes that the decoded media of one request may take: what the largest video takes. 0: any."""
    return _pixel_limit() * VIDEO_IMAGES * _BYTES_PER_FRAME_PIXEL


def _pixel_limit() -> int:
    return int(envs.VLLM_MAX_IMAGE_PIXELS) if "VLLM_MAX_IMAGE_PIXELS" in os.environ else MAX_IMAGE_PIXELS
