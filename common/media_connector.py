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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import PIL
from PIL import Image
from urllib3.util import parse_url
from vllm import envs
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, MediaConnector
from vllm.multimodal.media.connector import global_thread_pool
from vllm.transformers_utils.processor import get_video_processor_cls_name

from common.errors import BackendError, InvalidRequest, Unsupported
from common.media import MODALITIES, Item, fields_of

# The reserved top-level domain of RFC 2606: as the only domain allowed it refuses all, where an empty list allows all.
NO_DOMAIN = "media.invalid"
# Of one image, 8192 x 8192, where VLLM_MAX_IMAGE_PIXELS says nothing else: 200 MB as RGB.
MAX_IMAGE_PIXELS = 2**26


async def raw_prompt(text: str, items: Sequence[Item], renderer: Any) -> Any:
    """What vLLM takes for a prompt that has the model's own placeholders in it, with its media fetched and decoded.

    Raises:
        InvalidRequest: the model takes no such media, or not so many, or an item can't be fetched or decoded.

    """
    with named(items):
        info = renderer.get_mm_processor().info if renderer.mm_processor else None
        if info is None:
            raise InvalidRequest(fields_of(items), "this model takes text only")
        for modality in MODALITIES.values():
            if count := sum(item.modality == modality for item in items):
                info.validate_num_items(modality, count)
        config = renderer.model_config
        connector = Connector(
            config.multimodal_config.media_io_kwargs,
            allowed_local_media_path=config.allowed_local_media_path,
            allowed_media_domains=config.allowed_media_domains,
        )
        fetch = {
            "image": connector.fetch_image_async,
            "video": functools.partial(
                connector.fetch_video_async, video_processor=get_video_processor_cls_name(config)
            ),
            "audio": connector.fetch_audio_async,
        }
        data: dict[str, list[Any]] = {}
        for item, decoded in zip(
            items, await asyncio.gather(*(fetch[item.modality](item.url) for item in items)), strict=True
        ):
            data.setdefault(item.modality, []).append(decoded)
        return {"prompt": text, "multi_modal_data": data}


@contextlib.contextmanager
def named(items: Sequence[Item]) -> Iterator[None]:
    """Raise InvalidRequest or Unsupported where vLLM's renderer can't take `items`; its words may repeat the prompt."""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        text = str(error)
        if not items or isinstance(error, BackendError | VLLMValidationError):
            raise
        if isinstance(error, ImportError):
            # Resampling is torchaudio's, which comes with vLLM but not with every torch.
            raise Unsupported(
                f"{fields_of(items)}: this installation lacks a library for it, torchaudio maybe"
            ) from None
        if text.startswith("The audio "):
            reason = text
        elif text.endswith("is not a multimodal model"):
            reason = "this model takes text only"
        elif text.startswith("Expected there to be ") or "prompt replacement" in text:
            reason = "the prompt must hold the model's own placeholder once for each of them"
        elif text.startswith("Failed to apply "):
            reason = "the model's processor can't take them; are they too small, or too long and thin?"
        else:
            raise
        raise InvalidRequest(fields_of(items), reason) from None


@MEDIA_CONNECTOR_REGISTRY.register("http")  # in the place of vLLM's own, which it uses under this name
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
        with _refusals(where):
            if isinstance(media_io, ImageMediaIO):
                media_io = _LimitedImages(where, media_io)
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
        limit = envs.VLLM_MAX_IMAGE_PIXELS if "VLLM_MAX_IMAGE_PIXELS" in os.environ else MAX_IMAGE_PIXELS
        width, height = open_image(io.BytesIO(data)).size
        if width * height > limit > 0:
            raise InvalidRequest(
                self._where, f"has {width}x{height} pixels; {limit} are allowed (VLLM_MAX_IMAGE_PIXELS)"
            )
        return self._images.load_bytes(data)


@contextlib.contextmanager
def _refusals(where: str) -> Iterator[None]:
    try:
        yield
    except (BackendError, MemoryError):
        raise
    except ImportError:
        raise Unsupported(f"{where}: this installation can't decode it; it needs vLLM's extra `audio`") from None
    except Exception as error:  # noqa: BLE001  # a decoder may raise anything for damaged data
        raise InvalidRequest(where, _reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, VLLMValidationError | VLLMUnprocessableEntityError) or str(error).startswith("Audio "):
        return str(error.args[0])  # of vLLM's own limits, and of what a server answered
    if isinstance(error, binascii.Error):
        return "is not valid base64"
    if isinstance(error, Image.DecompressionBombError):
        return "has too many pixels"
    if isinstance(error, PIL.UnidentifiedImageError):
        return "is no image of a known format"
    # Pillow's own for damaged data have no number.
    if isinstance(error, OSError) and type(error) is not OSError:
        return f"can't be fetched or read ({type(error).__name__})"
    return "can't be decoded; it may be damaged"
