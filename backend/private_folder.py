"""The folder with the sockets by which the processes of `--frontends` talk; gone with them, see `private_folders`."""

import os
import tempfile

from backend.settings import SettingsError
from backend.sockets import MOST_PATH_BYTES
from common import private_folders

# What is put behind the folder's path, at most.
_LONGEST_NAME = 16


def make() -> str:
    """A new folder that nobody else can enter, below the temporary folder.

    Raises:
        SettingsError: the temporary folder's path is too long for a socket in it, or nothing can be made there.

    """
    try:
        folder = private_folders.make("backend-")
    except OSError as error:
        msg = f"no folder can be made in {tempfile.gettempdir()}: {error.strerror}"
        raise SettingsError(msg) from error
    if len(os.fsencode(folder)) + _LONGEST_NAME > MOST_PATH_BYTES:
        private_folders.remove(folder)
        msg = f"TMPDIR {tempfile.gettempdir()}: is too long; a socket's path has at most {MOST_PATH_BYTES} bytes"
        raise SettingsError(msg)
    return folder
