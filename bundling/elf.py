"""Shared libraries: what they need, what they are stripped of, and where they look for each other."""

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

# What every system with the GNU C library has, in the version that the bundle asks for.
LIBC = re.compile(
    r"(ld-linux.*|libc|libm|libmvec|libdl|libpthread|librt|libutil|libresolv|libanl|libthread_db"
    r"|libc_malloc_debug|libBrokenLocale)\.so\.\d+"
)
# What a device's driver brings, and no bundle can.
DRIVER = re.compile(r"(libcuda|libnvidia-.*|libnvcuvid|libnvoptix)\.so\.\d+")


@dataclasses.dataclass(frozen=True)
class Elf:
    """What the dynamic loader reads in a file."""

    needed: tuple[str, ...]
    soname: str
    glibc: tuple[int, ...]
    """The newest version of the C library that it asks for; empty where it asks for none."""


def read(path: Path) -> Elf | None:
    """None where the file is no executable or library."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return None
        file.seek(0)
        try:
            elf = ELFFile(file)
            if elf.header["e_type"] not in {"ET_DYN", "ET_EXEC"}:
                return None
            return _read(elf, path.name)
        except ELFError as error:
            raise ValueError(f"{path}: {error}") from error


def _read(elf: ELFFile, name: str) -> Elf:
    needed: list[str] = []
    soname = name
    versions: list[tuple[int, ...]] = [()]
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            for tag in section.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)
                elif tag.entry.d_tag == "DT_SONAME":
                    soname = tag.soname
        elif isinstance(section, GNUVerNeedSection):
            for _, entries in section.iter_versions():
                versions += [_glibc(entry.name) for entry in entries]
    return Elf(tuple(needed), soname, max(versions))


def _glibc(version: str) -> tuple[int, ...]:
    match = re.fullmatch(r"GLIBC_(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def read_all(folder: Path) -> dict[Path, Elf]:
    """Every executable and library below the folder, but for links."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path: elf for path in paths if (elf := read(path)) is not None}


def strip(paths: Iterable[Path]) -> int:
    """Remove symbols and debugging tables, which no loader reads; returns the bytes that were saved.

    A library whose paths were rewritten by an old patchelf does not survive it, and stays as it is.
    """
    saved = 0
    for path in paths:
        stripped = path.with_name(f"{path.name}.stripped")
        subprocess.run(["strip", "--strip-unneeded", "-o", stripped, "--", path], check=True)
        size = path.stat().st_size - stripped.stat().st_size
        if size > 0 and _loads(stripped):
            shutil.copymode(path, stripped)
            stripped.replace(path)
            saved += size
        else:
            stripped.unlink()
    return saved


def _loads(path: Path) -> bool:
    """Whether the loader can map it: what lies together in a page of the file does so in memory."""
    with path.open("rb") as file:
        loaded = [each.header for each in ELFFile(file).iter_segments("PT_LOAD")]
    return all((each.p_vaddr - each.p_offset) % max(each.p_align, 1) == 0 for each in loaded)


def look_in(paths: Iterable[Path], folder: Path) -> None:
    """Make libraries and executables look for others in `folder`, wherever both are moved together."""
    for path in paths:
        origin = f"$ORIGIN/{os.path.relpath(folder, path.parent)}"
        subprocess.run(["patchelf", "--set-rpath", origin, path], check=True)


def missing(elves: Iterable[Elf]) -> Iterator[str]:
    """Names of libraries that are needed and that nobody brings, sorted."""
    elves = list(elves)
    brought = {elf.soname for elf in elves}
    needed = {name for elf in elves for name in elf.needed}
    yield from sorted(name for name in needed - brought if not LIBC.fullmatch(name) and not DRIVER.fullmatch(name))


def of_this_system() -> dict[str, Path]:
    """The libraries of the machine that the dynamic loader finds, by name."""
    listing = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    found: dict[str, Path] = {}
    for name, path in re.findall(r"^\s+(\S+) \(.*\) => (\S+)$", listing, re.MULTILINE):
        if "/lib32/" not in path and "/libx32/" not in path:
            found.setdefault(name, Path(path))
    return found
