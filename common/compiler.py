"""Inductor's calls of the C++ compiler, below a folder whose path has a space.

PyTorch quotes the folders of headers in its command line, and not that of its libraries, which then arrives in pieces.
"""

import shlex
from pathlib import Path

import torch


def quote_paths() -> None:
    """Quote it for this process; vLLM calls this in every engine process (an entry point)."""
    folder = str(Path(torch.__file__).parent / "lib")
    if shlex.quote(folder) != folder:
        from torch.utils import cpp_extension

        cpp_extension.TORCH_LIB_PATH = shlex.quote(folder)
