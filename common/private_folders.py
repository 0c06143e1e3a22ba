"""Folders that only processes of this server use; gone with it, however it ends itself."""

import atexit
import os
import shutil
import tempfile

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
