"""lib/ and bin/: what the bundle needs of the building machine, and no other must have."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bundling import elf
from bundling import folder as files
from bundling.origin import Fetched

# Nobody links it: run.sh preloads it, for vLLM's CPU engine allocates a lot.
_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc-minimal4")
# For the cores and the memory nodes; without it no worker starts.
_PROGRAMS = ("lscpu",)
# A process must have one OpenMP runtime, and PyTorch brings its own; numba asks for it by its full name.
_OPENMP = ("libgomp.so.1", "libgomp.so.1.0.0")


def copy(folder: Path, elves: Mapping[Path, elf.Elf]) -> tuple[set[Path], list[Fetched]]:
    """Copy what nobody in the bundle brings, and what that needs in turn.

    Returns:
        The files of this machine that were copied, and the packages that had to be fetched.

    Raises:
        LookupError: this machine doesn't have one of them.

    """
    folder.mkdir(exist_ok=True)
    if gomp := next((path for path in elves if path.name == _OPENMP[0]), None):
        for name in _OPENMP:
            (folder / name).symlink_to(os.path.relpath(gomp, folder))
    here, known = elf.of_this_system(), [*elves.values(), *elf.read_all(folder).values()]
    name, package = _TCMALLOC
    fetched = []
    sources = set()
    wanted = [name]
    if name not in here:
        fetched.append(_fetch(package))
        here[name] = next(fetched[0].root.rglob(name))
    while wanted:
        for name in wanted:
            if name not in here:
                raise LookupError(f"{name} is needed and not on this machine")
            target = folder / name
            shutil.copyfile(here[name], target)
            elf.strip([target])
            known.append(elf.read(target) or elf.Elf((), name, ()))
            sources.add(here[name])
        wanted = [name for name in elf.missing(known) if not (folder / name).exists()]
    return {path for path in sources if not any(path.is_relative_to(each.root) for each in fetched)}, fetched


def copy_programs(folder: Path) -> set[Path]:
    """Copy the programs that vLLM's CPU engine calls; returns whence.

    Raises:
        LookupError: this machine doesn't have one of them.

    """
    sources = set()
    for name in _PROGRAMS:
        if not (found := shutil.which(name)):
            raise LookupError(f"{name} is not installed")
        files.copy(Path(found).resolve(), folder / name)
        sources.add(Path(found).resolve())
    return sources


def _fetch(package: str) -> Fetched:
    if not shutil.which("apt-get"):
        raise LookupError(f"{package} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="package-"))
    subprocess.run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], cwd=folder, check=True)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    said = subprocess.run(["dpkg-deb", "-f", archive, "Version"], capture_output=True, text=True, check=True)
    return Fetched(package, said.stdout.strip(), folder)
