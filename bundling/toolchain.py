"""A C++ compiler for inductor: the machine's g++ without what it does not open, in a folder that is its whole world."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from bundling import elf, headers
from bundling import folder as files

# Found by this name through PATH, for inductor's command lines hold no compiler whose path has a space.
NAME = "bundled-g++"
_WRAPPER = """\
#!/bin/sh
# This bundle's compiler of C++: it sees headers and libraries of this folder only. Wherever that is: $0 has its path.
here=${{0%/*}}/..
exec "$here/{driver}" --sysroot="$here" -B"$here/usr/bin/" "$@"
"""
# Beside the compiler, for a machine that has none.
_OPENSSL = """\
#!/bin/sh
# `openssl sha512 FILE`, by which inductor hashes headers, and nothing else of what openssl does.
[ "$#" -eq 2 ] && [ "$1" = sha512 ] || { echo "openssl: only 'sha512 FILE' is in this bundle" >&2; exit 1; }
exec "${0%/*}/../../python/bin/python3" -IS -c 'import hashlib, sys
with open(sys.argv[1], "rb") as file:
    print(f"SHA2-512({sys.argv[1]})=", hashlib.file_digest(file, "sha512").hexdigest())' "$2"
"""
_PROBE = "#include <bits/stdc++.h>\n#include <omp.h>\nint main() { return omp_get_max_threads() < std::sin(1.0); }\n"
_FLAGS = ("-O3", "-fPIC", "-fopenmp", "-pthread")
# The languages and hints of the linker that inductor does without.
_LIBRARIES = ("-lm", "-ldl", "-lrt", "-lpthread")


def copy(folder: Path, include: Path, generators: Path) -> tuple[set[Path], set[Path]]:
    """Copy the compiler, and the headers that the code of inductor can reach.

    Args:
        folder: of the new toolchain.
        include: PyTorch's headers.
        generators: the folder of inductor's modules, which write C++.

    Returns:
        The files of the machine that were copied, and the headers of `include` that are reached.

    """
    driver = _real(Path(shutil.which("g++") or _fail("g++ is not installed, and inductor needs it")))
    names = headers.named_in(generators) | {"bits/stdc++.h", "omp.h", "immintrin.h"}
    # Some of their names are put together from that of a device.
    names |= {str(path.relative_to(include)) for path in (include / "torch/csrc/inductor").rglob("*.h")}
    system = _search_path()
    reached = headers.reachable(names, [*system, include, include / "torch/csrc/api/include"])
    ours = {path for path in reached if path.is_relative_to(include)}
    programs = {Path(_ask(f"-print-prog-name={name}")) for name in ("cc1plus", "collect2")}
    # The linker's plugin, and what -fopenmp adds to its command line.
    parts = {Path(_ask(f"-print-file-name={name}")) for name in ("liblto_plugin.so", "libgomp.spec")}
    programs |= {path for path in parts if path.is_absolute()}
    theirs = {driver} | programs | _linked(driver) | (reached - ours)
    for path in theirs:
        _copy(path, folder)
    for name in ("as", "ld"):
        source, program = (
            _real(Path(shutil.which(name) or _fail(f"{name} is not installed"))),
            folder / "usr/bin" / name,
        )
        shutil.copyfile(source, program)
        program.chmod(0o755)
        theirs.add(source)
    for link in ("lib", "lib64"):
        if (Path("/") / link).is_symlink():
            (folder / link).symlink_to((Path("/") / link).readlink())
    (folder / "bin").mkdir()
    for name, text in ((NAME, _WRAPPER.format(driver=driver.relative_to("/"))), ("openssl", _OPENSSL)):
        (folder / "bin" / name).write_text(text, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    return theirs, ours


def needs(folder: Path) -> dict[Path, elf.Elf]:
    """The programs of a toolchain, which are to find their libraries; what programs are linked with is not run."""
    return {path: found for path, found in elf.read_all(folder).items() if path.name in _programs(folder)}


def _programs(folder: Path) -> set[str]:
    return {"as", "ld", "cc1plus", "collect2", "liblto_plugin.so"} | {
        path.name for path in (folder / "usr/bin").iterdir()
    }


def _search_path() -> list[Path]:
    said = subprocess.run(
        ["g++", "-E", "-v", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
    ).stderr
    found = re.search(r"#include <...> search starts here:\n(.*)End of search list", said, re.DOTALL)
    paths = [Path(line.strip()) for line in found[1].splitlines()] if found else []
    return [path for path in paths if path != Path("/usr/local/include")]


def _linked(driver: Path) -> set[Path]:
    """Every file that linking a library, or a program, opens; linker scripts and what they name too."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_PROBE, encoding="utf-8")
        opened = set()
        for kind in ([], ["-shared"]):
            command = [str(driver), *_FLAGS, *kind, str(source), "-o", f"{source}.so", *_LIBRARIES, "-Wl,--verbose"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            opened |= set(re.findall(r"^attempt to open (/.*) succeeded$", said, re.MULTILINE))
    return {path for path in map(Path, opened) if not path.is_relative_to(tempfile.gettempdir())}


def _copy(path: Path, folder: Path) -> None:
    """The file, not a link to it, at the same place in the folder."""
    target = folder / _real(path.parent).relative_to("/") / path.name
    files.copy(path, target)


def _real(path: Path) -> Path:
    return path.resolve(strict=True)


def _ask(question: str) -> str:
    return subprocess.run(["g++", question], capture_output=True, text=True, check=True).stdout.strip()


def _fail(sentence: str) -> str:
    raise LookupError(sentence)
