"""Folders that only processes of this server use; gone with it, however it ends itself."""

import atexit
import errno
import logging
import os
import shutil
import tempfile

logger = logging.getLogger(__name__)

MOST_SOCKET_PATH_BYTES = 107  # unix(7)
# Where sockets go if the temporary folder's path is too long for them.
_SHORT = "/tmp"  # noqa: S108  # nobody else can enter the folder that is made there

# Each with the process that has made it: one that is forked off removes none of them.
_folders: dict[str, int] = {}


def make(prefix: str, *, within: str | None = None) -> str:
    """A new folder that nobody else can enter; `within` None: below the temporary folder.

    Raises:
        OSError: none can be made there.

    """
    folder = tempfile.mkdtemp(prefix=prefix, dir=within)
    _folders[folder] = os.getpid()
    return folder


def make_for_sockets(prefix: str, longest_name: int, *, within: str | None = None) -> str:
    """A new folder for sockets whose names have at most so many bytes; `within` None: as the system's limit allows.

    Raises:
        OSError: none can be made there, or `within` is too long.

    """
    room = MOST_SOCKET_PATH_BYTES - longest_name - len("/")
    for parent in (within,) if within else (tempfile.gettempdir(), _SHORT):
        folder = make(prefix, within=parent)
        length = len(os.fsencode(folder))
        if length <= room:
            if not within and parent == _SHORT != tempfile.gettempdir():
                logger.info("%s is too long a path for sockets, which are in %s", tempfile.gettempdir(), folder)
            return folder
        remove(folder)
        longest = room - length + len(os.fsencode(parent))
    raise OSError(errno.ENAMETOOLONG, f"its path is too long for sockets; it may have {longest} bytes")


def remove(folder: str) -> None:
    """Remove one, with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    _folders.pop(folder, None)


@atexit.register
def remove_all() -> None:
    """Remove all that are left; to be called where the process ends without Python's own end."""
    for folder, maker in list(_folders.items()):
        if maker == os.getpid():
            remove(folder)
