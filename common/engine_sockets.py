"""Where the sockets lie by which an engine's processes talk: neither ZeroMQ nor vLLM ever removes their files."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator

from common import private_folders
from common.errors import LoadFailed

logger = logging.getLogger(__name__)

# Where vLLM makes them; its own default is the temporary folder.
VARIABLE = "VLLM_RPC_BASE_PATH"
MOST_PATH_BYTES = 107  # unix(7)
# vLLM calls them by a UUID.
_LONGEST_NAME = len("/") + 36


def make_folder() -> str | None:
    """A folder for those of one engine, to be removed with it; None where it would make their paths too long.

    Raises:
        LoadFailed: it can't be made.

    """
    within = os.environ.get(VARIABLE) or tempfile.gettempdir()
    try:
        folder = private_folders.make("zmq-", within=within)
    except OSError as error:
        msg = f"no folder for the engine's sockets can be made in {within}: {error.strerror}"
        raise LoadFailed(msg) from error
    if len(os.fsencode(folder)) + _LONGEST_NAME <= MOST_PATH_BYTES:
        return folder
    private_folders.remove(folder)
    logger.info("load: %s is too long a path for a folder of the engine's own, whose sockets stay there", within)
    return None


@contextlib.contextmanager
def made_in(folder: str | None) -> Iterator[None]:
    """A context in which an engine is to be started that makes them there; None: wherever vLLM does."""
    before = os.environ.get(VARIABLE)
    if folder is not None:
        os.environ[VARIABLE] = folder
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before
        elif folder is not None:
            del os.environ[VARIABLE]
