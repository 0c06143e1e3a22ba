"""The folder with the sockets that only processes of this server use; gone with it, however it ends itself."""

import atexit
import os
import shutil
import tempfile

from backend.settings import SettingsError
from backend.sockets import MOST_PATH_BYTES

# What is put behind the folder's path, at most.
_LONGEST_NAME = 16

_folder: str | None = None


def make() -> str:
    """A new folder that nobody else can enter, below the temporary folder; once per process.

    Raises:
        SettingsError: the temporary folder's path is too long for a socket in it, or nothing can be made there.

    """
    global _folder  # noqa: PLW0603  # one per process
    try:
        folder = tempfile.mkdtemp(prefix="backend-")
    except OSError as error:
        msg = f"no folder can be made in {tempfile.gettempdir()}: {error.strerror}"
        raise SettingsError(msg) from error
    _folder = folder
    atexit.register(remove)
    if len(os.fsencode(folder)) + _LONGEST_NAME > MOST_PATH_BYTES:
        remove()
        msg = f"TMPDIR {tempfile.gettempdir()}: is too long; a socket's path has at most {MOST_PATH_BYTES} bytes"
        raise SettingsError(msg)
    return folder


def remove() -> None:
    """Remove it, where there is one."""
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
