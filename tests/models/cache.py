"""Where made models are kept, and how a half-made one is never taken for a whole one.

    .models/                    ignored by git; the environment's MODELS_DIR overrides it
      scripted-1/               a whole model, recipe version 1
      .scripted-1.lock          held (flock) by the process that makes it; let go of when that one dies
      .scripted-1.partial/      being made, or left by a process that died; the next one starts over

Only a rename puts `scripted-1/` in place, so that the folder being there means that it is complete. To have a
model made anew, delete its folder.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def root() -> Path:
    """The folder that holds all models."""
    return Path(os.environ.get("MODELS_DIR") or REPOSITORY / ".models").absolute()


def folder(name: str, version: int, make: Callable[[Path], None]) -> Path:
    """The folder of a model; `make` is called to fill an empty one if there is none yet."""
    final = root() / f"{name}-{version}"
    if final.is_dir():
        return final
    root().mkdir(parents=True, exist_ok=True)
    with _locked(final.with_name(f".{final.name}.lock"), name):
        if not final.is_dir():
            partial = final.with_name(f".{final.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(final)
    return final


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"another process is making the model {name}; waiting for it\n")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
