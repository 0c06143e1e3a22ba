"""Files that a Python package ships, looked up in its list of files: the package is never imported."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from tests.models import MakeError


def shipped(package: str, wanted: Callable[[Path], bool], install: str) -> Path:
    """The first file of `package` that is `wanted`; `install` is what to do where there is none."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if wanted(path) and path.is_file():
            return path
    raise MakeError(f"the package {package}, which ships its weights, is not installed. {install}")
