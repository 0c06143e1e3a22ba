"""`python -m bundling SITE DEST [short]`: makes the bundle DEST of this repository and the environment's folder SITE.

`short` is for the tests of a change: the same files of the same packages, but symbols, bytecode and times are the
environment's, and there is no compiler, no proof of imports, no licences and no manifest.
"""

import collections
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath

from bundling import distributions, elf, folder, interpreter, libraries, manifest, origin, prune, toolchain
from bundling.distributions import OURS, UNUSED, Closure
from bundling.origin import Component, Fetched

REPOSITORY = Path(__file__).resolve().parents[1]
# Where a commit's time is not known: the first day that every archive format can hold.
_EPOCH = 315619200


def main(site: Path, dest: Path, form: str = "") -> None:
    """Make the bundle beside `dest` and move it there when it is whole.

    Raises:
        LookupError: the machine lacks something that belongs into it.

    """
    partial = dest.with_name(f".{dest.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (make_short if form == "short" else make)(site, partial)
        shutil.rmtree(dest, ignore_errors=True)
        partial.rename(dest)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def make(site: Path, bundle: Path) -> None:
    """Fill the empty folder `bundle`."""
    closure = distributions.closure(site)
    python = bundle / "python"
    packages = python / "lib" / interpreter.VERSION / "site-packages"
    say(f"{len(closure.needed)} distributions of {site}, accelerator {closure.accelerator}")
    gone = interpreter.copy(python, bundle / "lib")
    left_out = copy_distributions(closure, site, packages)
    prove(python / "lib" / interpreter.VERSION, packages, gone, left_out)
    copy_our_code(bundle)

    theirs: set[Path] = set()
    if closure.accelerator == "cpu":
        torch = site / "torch"
        theirs, headers = toolchain.copy(bundle / "toolchain", torch / "include", torch / "_inductor")
        for header in headers:
            folder.copy(header, packages / header.relative_to(site))
    say(f"stripped: {elf.strip(elf.read_all(bundle)) / folder.MIB:.0f} MiB of symbols and debugging tables")
    elves = elf.read_all(python)
    ours = {path: found for path, found in elves.items() if not path.is_relative_to(packages)}
    if closure.accelerator == "cpu":
        theirs |= libraries.copy_programs(bundle / "bin")
        ours |= toolchain.needs(bundle / "toolchain") | elf.read_all(bundle / "bin")
    copied, fetched = libraries.copy(bundle / "lib", elves | ours)
    ours |= elf.read_all(bundle / "lib")
    elf.look_in(ours, bundle / "lib")
    compile_all(bundle)

    components = describe(closure, theirs | copied, fetched, packages, bundle)
    for each in fetched:
        shutil.rmtree(each.root)
    time = datetime.datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH") or _commit_time()), datetime.UTC)
    version = closure.needed[OURS].version
    manifest.write_sbom(bundle / manifest.SBOM, OURS, version, components, time)
    glibc = max(found.glibc for found in (elves | ours).values())
    facts = {
        "name": OURS,
        "version": version,
        "accelerator": closure.accelerator,
        "platform": platform.machine(),
        "glibc": ".".join(map(str, glibc)),
        "python": platform.python_version(),
        "not installed": list(closure.absent),
        "not needed": UNUSED,
        "parts": dict(folder.parts(bundle)),
    }
    manifest.write_manifest(bundle, facts)
    folder.settle(bundle, time)
    say(f"needs glibc {facts['glibc']} or newer")
    for name, size in folder.parts(bundle):
        say(f"{size / folder.MIB:8.1f} MiB  {name}")
    total = sum(size for _, size in folder.parts(bundle))
    say(f"{total / folder.MIB:8.1f} MiB  in all, {sum(1 for _ in folder.walk(bundle))} files")


def make_short(site: Path, bundle: Path) -> None:
    """Fill the empty folder `bundle` with what serves without a compiler, in seconds."""
    closure = distributions.closure(site)
    python = bundle / "python"
    packages = python / "lib" / interpreter.VERSION / "site-packages"
    interpreter.copy(python, bundle / "lib")
    copy_distributions(closure, site, packages, folder.copy_compiled)
    copy_our_code(bundle)
    if closure.accelerator == "cpu":
        libraries.copy_programs(bundle / "bin")
        (bundle / "toolchain").mkdir()  # by which the environment knows a bundle for CPUs
    _, fetched = libraries.copy(bundle / "lib", elf.read_all(bundle))
    for each in fetched:
        shutil.rmtree(each.root)
    elf.look_in(
        {path: found for path, found in elf.read_all(bundle).items() if packages not in path.parents}, bundle / "lib"
    )


def copy_distributions(
    closure: Closure, site: Path, packages: Path, copy: Callable[[Path, Path], None] = folder.copy
) -> list[PurePosixPath]:
    """Copy what stays of every distribution, with a RECORD of just that; returns what does not."""
    left_out: list[PurePosixPath] = []
    bytes_of: collections.Counter[str] = collections.Counter()
    for name, distribution in closure.needed.items():
        kept = []
        for path in distributions.files(distribution):
            if not (site / path).is_file():
                continue
            if why := prune.reason(path, closure.accelerator):
                left_out.append(path)
                bytes_of[why] += (site / path).stat().st_size
            elif name != OURS or path.parts[0].endswith(".dist-info"):
                copy(site / path, packages / path)
                kept.append(path)
        if name == OURS:
            _write_entry_points(packages / kept[0].parts[0])
        _write_record(distribution, kept, packages)
    for why, size in bytes_of.most_common(8):
        say(f"left out: {size / folder.MIB:6.1f} MiB  {why}")
    return left_out


def _write_entry_points(info: Path) -> None:
    """Ours, as pyproject.toml has them now: vLLM finds its plugins there."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = []
    for group, entries in sorted(project["entry-points"].items()):
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in sorted(entries.items())), ""]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def _write_record(distribution: Distribution, kept: Iterable[PurePosixPath], packages: Path) -> None:
    """Transformers finds out which distribution a module belongs to by what RECORD lists; nothing reads its hashes."""
    info = Path(str(getattr(distribution, "_path", ""))).name
    lines = sorted(f'"{path}",,' if "," in str(path) else f"{path},," for path in kept)
    (packages / info / "RECORD").write_text("\n".join([*lines, f"{info}/RECORD,,", ""]), encoding="utf-8")


def prove(stdlib: Path, packages: Path, gone: list[PurePosixPath], left_out: list[PurePosixPath]) -> None:
    """No module in the bundle imports one that is left out of it.

    Raises:
        LookupError: some do.

    """
    kept = [
        (PurePosixPath(path.relative_to(each)), path)
        for each in (packages, stdlib)
        for path in sorted(each.rglob("*"))
        if path.is_file() and (each == packages or not path.is_relative_to(packages))
    ]
    if found := prune.dangling_imports(kept, [*gone, *left_out]):
        raise LookupError("what is left out is still imported:\n" + "\n".join(map(str, found)))


def copy_our_code(bundle: Path) -> None:
    """Copy the packages, the protocol, and what starts them."""
    for package in ("backend", "common"):
        shutil.copytree(REPOSITORY / package, bundle / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyi"))
    for name in ("proto/backend.proto", "run.sh"):
        folder.copy(REPOSITORY / name, bundle / name)
    folder.copy(REPOSITORY / "packaging/bundle-environment.sh", bundle / "lib/environment.sh")


def compile_all(bundle: Path) -> None:
    """Bytecode that is never compared with its source: nothing is written at run time, and times do not matter.

    Raises:
        LookupError: the bundle's interpreter does not run here.

    """
    command = [str(bundle / "python/bin/python3"), "-m", "compileall", "-q", "-j", str(os.cpu_count() or 1)]
    command += ["--invalidation-mode", "unchecked-hash", "-s", str(bundle), "-x", prune.UNCOMPILED.pattern, str(bundle)]
    # With a seed of its own each run would order sets anew; and compileall leaves alone what its imports have written.
    subprocess.run(
        command, env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}, stdout=subprocess.DEVNULL, check=False
    )
    # Files that are no modules, templates above all, fail; ours may not.
    if not list((bundle / "common/__pycache__").glob("model.*.pyc")):
        raise LookupError("the bundle's interpreter compiles nothing")


def describe(
    closure: Closure, theirs: set[Path], fetched: list[Fetched], packages: Path, bundle: Path
) -> list[Component]:
    """All that is of others, listed in licenses/README.md, with the texts that are not in the packages' own folders."""
    licences = bundle / "licenses"
    licences.mkdir()
    text = f"python/lib/{interpreter.VERSION}/LICENSE.txt"
    if not (bundle / text).is_file():
        raise LookupError(f"Python's licence is not at {text}")
    found = [Component("CPython", platform.python_version(), "generic", "PSF-2.0", text)]
    others = (each for name, each in closure.needed.items() if name != OURS)
    found += origin.python_packages(others, str(packages.relative_to(bundle)))
    found += origin.system_packages(theirs, fetched, licences / "system")
    rows = [f"| {each.name} | {each.version} | {each.licence} | {each.text} |" for each in found]
    table = [
        "# What is in this bundle, and under which licences",
        "",
        "| | version | licence | text |",
        "|---|---|---|---|",
    ]
    (licences / "README.md").write_text("\n".join([*table, *rows, ""]), encoding="utf-8")
    return found


def say(line: str) -> None:
    """Tell the user."""
    print(f"package.sh: {line}", flush=True)


def _commit_time() -> int:
    said = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    return int(said.stdout) if said.returncode == 0 and said.stdout.strip() else _EPOCH


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    except LookupError as error:
        sys.exit(f"package.sh: {error}")
