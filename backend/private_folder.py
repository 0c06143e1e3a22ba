"""The folder with the sockets by which the processes of `--frontends` talk; gone with them, see `private_folders`."""

import tempfile

from backend.flag_values import SettingsError
from common import private_folders

# What is put into the folder, at most.
_LONGEST_NAME = 15


def make() -> str:
    """A new folder that nobody else can enter.

    Raises:
        SettingsError: none can be made.

    """
    try:
        return private_folders.make_for_sockets("backend-", _LONGEST_NAME)
    except OSError as error:
        msg = f"no folder can be made in {tempfile.gettempdir()}: {error.strerror}"
        raise SettingsError(msg) from error
