"""What needs a torchvision: questions about images, held against vLLM's server, and their embeddings."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.engine.conftest import Engines
from tests.models import torchvision

ROOMS = ("about_images.py", "about_image_embeddings.py")


async def test_in_a_python_of_its_own(engines: Engines) -> None:
    """Since transformers decides on import whether there is a torchvision."""
    await engines.close()
    rooms = [str(Path(__file__).with_name(room)) for room in ROOMS]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *rooms]
    environment = os.environ | {"PYTHONPATH": torchvision.python_path()}
    done = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
