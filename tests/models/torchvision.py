"""torchvision, without which vLLM does not look into a model class with pictures.

On a machine whose torch came as a wheel of its own, torchvision's builds do not fit it: their compiled part does not
load. `python_path` gives what makes that do for a test, a folder for PYTHONPATH.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.models import MakeError, cache

TORCHVISION = "torchvision==0.28.0"
# The two operators that torchvision's compiled part would define; Python code of torchvision names them on import.
SITECUSTOMIZE = '''\
"""Made by tests/models/torchvision.py: lets torchvision be imported without its compiled part."""

import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    "torchvision::" + operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, _BeforeTorchvision())
'''


def python_path() -> str:
    """The PYTHONPATH of a server that can load a model with pictures: ours, and torchvision where it isn't installed.

    Installed into the folder of the models on first use, from the package index. Raises `MakeError`.
    """
    ours = os.environ.get("PYTHONPATH", "")
    if importlib.util.find_spec("torchvision"):
        return ours
    folder = str(cache.folder("torchvision", 1, _install))
    return os.pathsep.join([folder, ours]) if ours else folder


def _install(into: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv") or str(cache.REPOSITORY / ".uv/bin/uv")
    installer = (
        [uv, "pip", "install", "--python", sys.executable] if Path(uv).exists() else ["python3", "-m", "pip", "install"]
    )
    done = subprocess.run(
        [*installer, "--quiet", "--no-deps", "--target", into, TORCHVISION], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise MakeError(f"{TORCHVISION} can't be installed: {last}")
    (into / "sitecustomize.py").write_text(SITECUSTOMIZE)
