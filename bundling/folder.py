"""The bundle as a folder of files: how they are copied, counted and left behind."""

import collections
import datetime
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MIB = 1024 * 1024


def copy(source: Path, target: Path) -> None:
    """Copy contents and mode, and make the folders above."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    shutil.copymode(source, target)


def copy_compiled(source: Path, target: Path) -> None:
    """Copy a module with the bytecode that lies beside it and goes by its time."""
    copy(source, target)
    stat = source.stat()
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bytecode = Path(importlib.util.cache_from_source(str(source)))
    if bytecode.is_file():
        copy(bytecode, Path(importlib.util.cache_from_source(str(target))))


def walk(folder: Path) -> Iterator[Path]:
    """Every file and link below the folder."""
    return (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def parts(bundle: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of each part: the largest packages by name, the rest by folder; largest first."""
    sizes: collections.Counter[str] = collections.Counter()
    for path in walk(bundle):
        parts = path.relative_to(bundle).parts
        size = path.lstat().st_size
        if path.suffix == ".pyc":
            sizes["bytecode"] += size
        elif "site-packages" in parts and len(parts) > 5:
            sizes[parts[4].removesuffix(".libs")] += size
        else:
            sizes[parts[0] if len(parts) > 1 else "manifest, bill of materials, run.sh"] += size
    small = {
        name for name, size in sizes.items() if size < 8 * MIB and not (bundle / name).exists() and "," not in name
    }
    sizes["other packages"] = sum(sizes.pop(name) for name in small)
    yield from sizes.most_common()


def settle(bundle: Path, time: datetime.datetime) -> None:
    """Give everything one time, and rights by which any user can read and run it and nobody writes."""
    for path in sorted(bundle.rglob("*"), reverse=True):
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & 0o111
            path.chmod(0o755 if runs else 0o644)
        os.utime(path, (time.timestamp(), time.timestamp()), follow_symlinks=False)
    os.utime(bundle, (time.timestamp(), time.timestamp()))
