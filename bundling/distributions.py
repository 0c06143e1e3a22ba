"""The installed distributions that the server needs, and no others: no test tool, nothing of the demo."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "vllm-grpc-backend"

# What is required and no path of the server uses.
UNUSED = {
    "grpcio-tools": "makes the stubs, which are in the bundle",
    "intel-cmplr-lib-ur": "comes with intel-openmp",
    "intel-openmp": "torch is built for libgomp, and a process must not have two",
}


@dataclasses.dataclass(frozen=True)
class Closure:
    """What the server needs of an environment."""

    accelerator: str
    """The extra of pyproject.toml that it was installed with."""
    needed: dict[str, importlib.metadata.Distribution]
    """By canonical name, sorted; ours among them."""
    absent: tuple[str, ...]
    """What is required and not installed: overrides keep it out."""


def closure(site: Path) -> Closure:
    """Follow the requirements of our own distribution through what is installed in the folder `site`.

    Raises:
        LookupError: the environment has no vLLM, or nothing of ours.

    """
    installed = {str(canonicalize_name(each.name)): each for each in importlib.metadata.distributions(path=[str(site)])}
    accelerator = _accelerator(installed[OURS], installed.keys()) if OURS in installed else None
    if accelerator is None:
        raise LookupError(f"vLLM or our own distribution is not installed in {site}: run ./install.sh")
    with contextlib.suppress(FileNotFoundError):
        # Where several extras ask for the same, ./install.sh says which it was.
        accelerator = (site.parents[2] / "profile").read_text(encoding="utf-8").split()[0]
    extras: dict[str, frozenset[str]] = {}
    absent = set()
    todo = [(OURS, frozenset({accelerator}))]
    while todo:
        name, wanted = todo.pop()
        if (name in extras and wanted <= extras[name]) or name in UNUSED:
            continue
        if name not in installed:
            absent.add(name)
            continue
        extras[name] = wanted | extras.get(name, frozenset())
        todo += _requirements(installed[name], extras[name])
    return Closure(accelerator, {name: installed[name] for name in sorted(extras)}, tuple(sorted(absent)))


def _accelerator(ours: importlib.metadata.Distribution, installed: Collection[str]) -> str | None:
    """The first extra that brings a vLLM, and whose vLLM is there."""
    for extra in ours.metadata.get_all("Provides-Extra") or ():
        names = {name for name, _ in _requirements(ours, frozenset({str(extra)}))}
        if any(name.startswith("vllm") and name in installed for name in names):
            return str(extra)
    return None


def _requirements(
    distribution: importlib.metadata.Distribution, extras: frozenset[str]
) -> Iterator[tuple[str, frozenset[str]]]:
    for line in distribution.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def files(distribution: importlib.metadata.Distribution) -> Iterator[PurePosixPath]:
    """What the distribution put below site-packages, relative to it; without bytecode.

    Scripts and data elsewhere in the environment stay out: nothing is started by a script, whose first line is a path.
    """
    for each in distribution.files or ():
        path = PurePosixPath(each)
        if ".." not in path.parts and "__pycache__" not in path.parts:
            yield path
