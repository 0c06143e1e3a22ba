"""Which packages of the building machine files come from, and under what terms."""

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

_DOCUMENTS = Path("/usr/share/doc")
_COMMON = Path("/usr/share/common-licenses")


@dataclasses.dataclass(frozen=True, order=True)
class Component:
    """Something of others that the bundle has in it, whole or in part."""

    name: str
    version: str
    kind: str
    """pypi, deb or generic: the type of its package URL."""
    licence: str
    """As its authors name it; "see text" where only the text says."""
    text: str
    """Where in the bundle the text is: a file or a folder."""


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A package that is not installed here, unpacked."""

    name: str
    version: str
    root: Path


def python_packages(distributions: Iterable[Distribution], site: str) -> list[Component]:
    """The components that installed distributions are; their texts are in their own metadata."""
    found = []
    for each in distributions:
        folder = f"{site}/{Path(str(getattr(each, '_path', ''))).name}"
        found.append(Component(each.name, each.version, "pypi", _declared(each), folder))
    return found


def system_packages(paths: Iterable[Path], fetched: Iterable[Fetched], licences: Path) -> list[Component]:
    """The packages that files of this machine belong to; copies what they say about their licences.

    A file that no package owns is a component of its own, without a text.
    """
    owners, orphans = _owners({path.parent.resolve() / path.name for path in paths})
    found = [Component(path.name, "unknown", "generic", "unknown", "") for path in sorted(orphans)]
    packages = [(name, version, _DOCUMENTS) for name, version in sorted(owners)]
    packages += [(each.name, each.version, each.root / _DOCUMENTS.relative_to("/")) for each in fetched]
    for name, version, documents in packages:
        target = licences / name
        target.mkdir(parents=True, exist_ok=True)
        document = documents / name / "copyright"
        text = document.read_text(encoding="utf-8", errors="replace") if document.is_file() else ""
        (target / "copyright").write_text(text, encoding="utf-8")
        for common in set(re.findall(rf"{_COMMON}/([\w.+-]*\w)", text)):
            if (_COMMON / common).is_file():
                (licences / "common").mkdir(exist_ok=True)
                shutil.copyfile(_COMMON / common, licences / "common" / common)
        named = sorted(set(re.findall(r"^License: *(\S+)", text, re.MULTILINE)))
        where = f"{licences.parent.name}/{licences.name}/{name}/copyright" if text else ""
        found.append(Component(name, version, "deb", " AND ".join(named) or "see text", where))
    return found


def _declared(distribution: Distribution) -> str:
    metadata = distribution.metadata
    for field in ("License-Expression", "License"):
        said = str((metadata.get_all(field) or [""])[0]).strip()
        if said and "\n" not in said and said != "UNKNOWN":
            return said
    classifiers = [str(line) for line in metadata.get_all("Classifier") or () if str(line).startswith("License ::")]
    return " AND ".join(line.rpartition(" :: ")[2] for line in classifiers) or "see text"


def _owners(paths: set[Path]) -> tuple[set[tuple[str, str]], set[Path]]:
    """Name and version of the packages, and the files that none owns."""
    if not shutil.which("dpkg-query"):
        return set(), paths
    # A package may name a file by the folder that is a link today.
    spelled: dict[str, Path] = {}
    for path in sorted(paths):
        for each in {path, path.resolve()}:
            text = str(each)
            spelled |= {text: path, text.removeprefix("/usr"): path, f"/usr{text.removeprefix('/usr')}": path}
    said = subprocess.run(["dpkg-query", "-S", *spelled], check=False, capture_output=True, text=True).stdout
    package_of: dict[Path, str] = {}
    for packages, _, text in (line.rpartition(": ") for line in said.splitlines()):
        if text in spelled and not packages.startswith("diversion"):
            package_of.setdefault(spelled[text], packages.split(", ")[0])
    names = sorted(set(package_of.values()))
    if not names:
        return set(), paths
    shown = ["dpkg-query", "-W", "-f", "${Package}\t${Version}\n", *names]
    lines = subprocess.run(shown, check=True, capture_output=True, text=True).stdout.splitlines()
    owners = {(name, version) for name, _, version in (line.partition("\t") for line in lines)}
    return owners, paths - package_of.keys()
