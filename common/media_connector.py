"""How media are fetched and decoded: by vLLM, behind the limits of this server, and refused by the name of their field.

No text raised here holds anything of a payload.
"""

import asyncio
import binascii
import contextlib
import contextvars
import functools
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import PIL
from PIL import Image
from urllib3.util import parse_url
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.connector import global_thread_pool

from common.errors import BackendError, InvalidRequest, Unsupported
from common.media_readers import limited

# The name of vLLM's own, in the place of which ours is registered; the environment could name another.
CONNECTOR = "http"
# The reserved top-level domain of RFC 2606: as the only domain allowed it refuses all, where an empty list allows all.
NO_DOMAIN = "media.invalid"
_REASONS = {
    binascii.Error: "is not valid base64",
    Image.DecompressionBombError: "has too many pixels",
    PIL.UnidentifiedImageError: "is no image of a known format",
}


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class Connector(MediaConnector):  # type: ignore[misc]  # vLLM is untyped to us
    """vLLM's connector for the URLs of `Item`, with limits.

    Paths only from the allowed folder, and http(s) only from public addresses of the allowed domains; neither unless
    configured. All that it raises for the contents of an item is InvalidRequest, or Unsupported for want of a decoder.
    """

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """As `load_from_url`, in vLLM's threads for media."""
        load = functools.partial(self.load_from_url, url, media_io, fetch_timeout=fetch_timeout)
        # What is decoded belongs to the request that this is called for.
        load = functools.partial(contextvars.copy_context().run, load)
        return await asyncio.get_running_loop().run_in_executor(global_thread_pool, load)

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        """The decoded item."""
        where, _, url = url.partition(" ")
        with refusals(where):
            return self._load(where, url, limited(where, media_io), fetch_timeout)

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
