"""`python -m tests.bench.tied COMMAND ...`: becomes the command, which the kernel kills when its parent dies.

Also when it is stopped, and could not notice that by itself.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606  # that is what it is for
