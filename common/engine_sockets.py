"""Where the sockets lie by which an engine's processes talk: neither ZeroMQ nor vLLM ever removes their files."""

import contextlib
import os
import tempfile
from collections.abc import Iterator

from common import private_folders
from common.errors import LoadFailed

# Where vLLM makes them; its own default is the temporary folder.
VARIABLE = "VLLM_RPC_BASE_PATH"
# vLLM calls them by a UUID.
_LONGEST_NAME = 36


def make_folder() -> str:
    """A folder for those of one engine, to be removed with it.

    Raises:
        LoadFailed: it can't be made.

    """
    named = os.environ.get(VARIABLE)
    try:
        return private_folders.make_for_sockets("zmq-", _LONGEST_NAME, within=named)
    except OSError as error:
        within = f"{VARIABLE}, {named}" if named else tempfile.gettempdir()
        msg = f"no folder for the engine's sockets can be made in {within}: {error.strerror}"
        raise LoadFailed(msg) from error


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
