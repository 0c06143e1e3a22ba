"""Libraries that make a CPU engine faster, where they are installed: its processes are started with them.

tcmalloc takes malloc's place, and Intel's OpenMP that of the one that comes with PyTorch: each was worth 5 to 7 % of
SmolLM2's tokens here. vLLM asks for both in its log; by itself it preloads what its own package brings.
"""

import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

VARIABLE = "LD_PRELOAD"
# Of the package `intel-openmp` the first, then where distributions have theirs.
FOLDERS = (
    Path(sys.prefix, "lib"),
    Path("/usr/lib", sysconfig.get_config_var("MULTIARCH") or ""),
    Path("/usr/lib64"),
)
_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
_IOMP = ("libiomp5.so",)
_OPENMP = ("libiomp", "libomp", "libgomp")
_MALLOC = ("tcmalloc", "jemalloc", "mimalloc")


def libraries(environ: Mapping[str, str], folders: Iterable[Path] = FOLDERS) -> str | None:
    """What the variable should be; None where nothing is to be added.

    What the user preloads comes first, and stands for its kind; a variable that is set and empty, for both.
    """
    given = environ.get(VARIABLE)
    if given == "":
        return None
    given = given or ""
    wanted: list[tuple[str, ...]] = [] if any(name in given for name in _MALLOC) else [_TCMALLOC]
    if not any(name in given for name in _OPENMP):
        wanted.append(_IOMP)
    places = list(folders)
    found = [
        next((str(folder / name) for name in names for folder in places if (folder / name).is_file()), None)
        for names in wanted
    ]
    added = [path for path in found if path and ":" not in path and " " not in path]
    return ":".join([given, *added] if given else added) if added else None
