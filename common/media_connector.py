"""How media are fetched and decoded: by vLLM, behind the limits of this server, and refused by the name of their field.

No text raised here holds anything of a payload.
"""

import asyncio
import base64
import binascii
import contextlib
import functools
import io
import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import PIL
from PIL import Image
from urllib3.util import parse_url
from vllm import envs
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, AudioMediaIO, ImageMediaIO, MediaConnector, VideoMediaIO
from vllm.multimodal.media.connector import global_thread_pool

from common.errors import BackendError, InvalidRequest, Unsupported

# The name of vLLM's own, in the place of which ours is registered; the environment could name another.
CONNECTOR = "http"
# The reserved top-level domain of RFC 2606: as the only domain allowed it refuses all, where an empty list allows all.
NO_DOMAIN = "media.invalid"
# Of one image, 8192 x 8192, where VLLM_MAX_IMAGE_PIXELS says nothing else: 200 MB as RGB.
MAX_IMAGE_PIXELS = 2**26
# All frames that are taken of one video may have as many pixels as this many images: 3 GB as RGB, 500 frames of 1080p.
VIDEO_IMAGES = 16
# A header may claim any number, and vLLM's reader asks OpenCV for each of them up to the last that it takes, there or
# not: 57 us for one that is not, the time of decoding for one that is. 55 minutes at 30 Hz.
MAX_VIDEO_FRAMES = 100_000
_REASONS = {
    binascii.Error: "is not valid base64",
    Image.DecompressionBombError: "has too many pixels",
    PIL.UnidentifiedImageError: "is no image of a known format",
}
# OpenCV's CAP_PROP_FRAME_WIDTH and _HEIGHT.
_WIDTH, _HEIGHT = 3, 4


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class Connector(MediaConnector):  # type: ignore[misc]  # vLLM is untyped to us
    """vLLM's connector for the URLs of `Item`, with limits.

    Paths only from the allowed folder, and http(s) only from public addresses of the allowed domains; neither unless
    configured. All that it raises for the contents of an item is InvalidRequest, or Unsupported for want of a decoder.
    """

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """As `load_from_url`, in vLLM's threads for media."""
        load = functools.partial(self.load_from_url, url, media_io, fetch_timeout=fetch_timeout)
        return await asyncio.get_running_loop().run_in_executor(global_thread_pool, load)

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """The decoded item."""
        where, _, url = url.partition(" ")
        with refusals(where):
            if isinstance(media_io, ImageMediaIO):
                media_io = _LimitedImages(where, media_io)
            if isinstance(media_io, VideoMediaIO):
                media_io = _LimitedVideos(where, media_io)
            decoded = self._load(where, url, media_io, fetch_timeout)
            if isinstance(media_io, AudioMediaIO) and not len(decoded[0]):
                raise InvalidRequest(where, "holds no sound")
            return decoded

    def _load(self, where: str, url: str, media_io: Any, fetch_timeout: int | None) -> Any:
        if url.startswith("file:"):
            return media_io.load_file(self._allowed_file(where, Path(unquote(url.removeprefix("file://")))))
        if not url.startswith("data:"):
            self._check_host(where, str(parse_url(url).hostname))
        return super().load_from_url(url, media_io, fetch_timeout=fetch_timeout)

    def _allowed_file(self, where: str, path: Path) -> Path:
        folder = self.allowed_local_media_path
        if folder is None:
            raise InvalidRequest(
                where, "is a path; the engine argument allowed_local_media_path allows those of a folder"
            )
        path = path.resolve()
        # Nothing is said of files elsewhere, not even whether they exist.
        if folder not in path.parents:
            raise InvalidRequest(where, "is a path outside the folder of the engine argument allowed_local_media_path")
        if not path.is_file():
            raise InvalidRequest(where, "is the path of no regular file")
        return path

    def _check_host(self, where: str, host: str) -> None:
        if host not in self.allowed_media_domains:
            raise InvalidRequest(where, "is a URL; the engine argument allowed_media_domains allows those of a domain")
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), None)}
        if not all(ipaddress.ip_address(address.partition("%")[0]).is_global for address in addresses):
            raise InvalidRequest(where, "is a URL of a private address")


class _LimitedImages:
    """vLLM's image reader behind a look at the header: the size is known before anything is decoded."""

    def __init__(self, where: str, images: Any) -> None:
        self._where = where
        self._images = images

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)

    def load_base64(self, _media_type: str, data: str) -> Any:
        return self.load_bytes(base64.b64decode(data, validate=True))

    def load_file(self, path: Path) -> Any:
        return self.load_bytes(path.read_bytes())

    def load_bytes(self, data: bytes) -> Any:
        limit = _pixel_limit()
        width, height = open_image(io.BytesIO(data)).size
        if width * height > limit > 0:
            raise InvalidRequest(
                self._where, f"has {width}x{height} pixels; {limit} are allowed (VLLM_MAX_IMAGE_PIXELS)"
            )
        return self._images.load_bytes(data)


class _LimitedVideos:
    """vLLM's video reader behind a look at how much it is about to decode."""

    def __init__(self, where: str, videos: Any) -> None:
        self._videos = videos
        # The reader is made for this one video.
        videos.video_loader = type("_Loader", (_LimitedFrames, type(videos.video_loader)), {"where": where})()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._videos, name)

    def load_base64(self, _media_type: str, data: str) -> Any:
        # By the type alone vLLM would take a list of pictures for a video.
        return self.load_bytes(base64.b64decode(data, validate=True))


class _LimitedFrames:
    """What stands before the methods of a loader of vLLM's, which are all the class's."""

    where = ""

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
        _check_frames(cls.where, int(cap.get(_WIDTH)), int(cap.get(_HEIGHT)), len(frame_idx))
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


def _pixel_limit() -> int:
    return int(envs.VLLM_MAX_IMAGE_PIXELS) if "VLLM_MAX_IMAGE_PIXELS" in os.environ else MAX_IMAGE_PIXELS


@contextlib.contextmanager
def refusals(where: str) -> Iterator[None]:
    """Raise InvalidRequest for what a decoder says of the field `where`, Unsupported where there is no decoder."""
    try:
        yield
    except (BackendError, MemoryError):
        raise
    except ImportError:
        raise Unsupported(f"{where}: this installation can't decode it; it needs vLLM's extra `audio`") from None
    except Exception as error:  # noqa: BLE001  # a decoder may raise anything for damaged data
        raise InvalidRequest(where, _reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, VLLMValidationError | VLLMUnprocessableEntityError):
        return str(error.args[0])  # of vLLM's own limits, and of what a server answered
    if str(error).startswith(("Audio ", "Video frame dimensions ")):
        return str(error)
    for kind, reason in _REASONS.items():
        if isinstance(error, kind):
            return reason
    # Pillow's own for damaged data have no number.
    if isinstance(error, OSError) and type(error) is not OSError:
        return f"can't be fetched or read ({type(error).__name__})"
    return "can't be decoded; it may be damaged"
