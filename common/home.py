"""A folder for what vLLM, the compiler and the hub keep, for a process whose user has none: a container's, a service's.

They look for it below HOME and each fails in its own way where that is missing or read-only, some late.
"""

import getpass
import logging
import os
import stat
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def ensure_home() -> None:
    """Give HOME and USER values that can be used, unless they are; says so."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
    home = os.path.expanduser("~")  # pathlib's raises for a user that no file knows
    if os.path.isabs(home) and os.access(home, os.W_OK | os.X_OK):
        return
    os.environ["HOME"] = str(_own_folder())
    logger.info("HOME=%s, for %s can't be written to", os.environ["HOME"], home)


def _own_folder() -> Path:
    """The same for every start of this user; another, if somebody else has put something there."""
    folder = Path(tempfile.gettempdir()) / f"vllm-grpc-backend-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        found = None
    if found and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="vllm-grpc-backend-"))
