"""Python itself: the environment's interpreter with its standard library, which run from any folder."""

import shutil
import sys
import sysconfig
from pathlib import Path, PurePosixPath

from bundling import folder, prune

# What python-build-standalone writes where the folder of the build was.
_NOWHERE = "/install"
VERSION = f"python{sys.version_info[0]}.{sys.version_info[1]}"


def copy(python: Path, libraries: Path) -> list[PurePosixPath]:
    """Copy the interpreter that runs this to the folder `python`, and the library that it may be to `libraries`.

    Returns what was left out of the standard library.
    """
    base = Path(sys.base_prefix)
    executable = (base / "bin" / VERSION).resolve(strict=True)
    folder.copy(executable, python / "bin" / VERSION)
    (python / "bin" / "python3").symlink_to(VERSION)
    for library in (base / "lib").glob(f"lib{VERSION}*.so.*"):
        folder.copy(library, libraries / library.name)
    headers = Path(sysconfig.get_path("include", vars={"installed_base": str(base)}))
    shutil.copytree(headers, python / "include" / VERSION, ignore=shutil.ignore_patterns("site"))
    stdlib = Path(sysconfig.get_path("stdlib", vars={"installed_base": str(base)}))
    left_out = []
    for path in sorted(stdlib.rglob("*")):
        relative = PurePosixPath(path.relative_to(stdlib))
        if not path.is_file():
            continue
        if prune.stdlib_reason(relative):
            left_out.append(relative)
        else:
            folder.copy(path, python / "lib" / VERSION / relative)
    for path in (python / "lib" / VERSION).glob("_sysconfigdata_*.py"):
        text = path.read_text(encoding="utf-8").replace(str(base), _NOWHERE)
        path.write_text(text, encoding="utf-8")
    return left_out
