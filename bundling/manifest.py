"""What is in the bundle: every file with its size and hash, and every component as a CycloneDX bill of materials."""

import datetime
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cyclonedx.model import Property
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component as Part
from cyclonedx.model.component import ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from bundling.origin import Component

MANIFEST, SBOM = "manifest.json", "sbom.cdx.json"
_CHUNK = 1024 * 1024


def write_manifest(bundle: Path, facts: Mapping[str, Any]) -> None:
    """Write `facts` and all files but the manifest itself."""
    head = json.dumps(dict(facts), indent=1, ensure_ascii=False).removesuffix("\n}")
    entries = (_entry(path, bundle) for path in sorted(bundle.rglob("*")) if _listed(path, bundle))
    files = ",\n".join(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in entries)
    (bundle / MANIFEST).write_text(f'{head},\n "files": [\n{files}\n]}}\n', encoding="utf-8")


def write_sbom(path: Path, name: str, version: str, components: Iterable[Component], time: datetime.datetime) -> None:
    """Write the bill of materials of the bundle; two of the same components are the same file."""
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"{name}@{version}@{time.isoformat()}"))
    bom.metadata.timestamp = time
    bom.metadata.component = Part(name=name, version=version, type=ComponentType.APPLICATION, bom_ref=name)
    for each in components:
        url = PackageURL(each.kind, "debian" if each.kind == "deb" else None, each.name, each.version)
        part = Part(name=each.name, version=each.version, type=ComponentType.LIBRARY, purl=url, bom_ref=str(url))
        part.licenses.add(DisjunctiveLicense(name=each.licence))
        if each.text:
            part.properties.add(Property(name="bundle:licence-text", value=each.text))
        bom.components.add(part)
        bom.register_dependency(bom.metadata.component, [part])
    path.write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n", encoding="utf-8")


def _listed(path: Path, bundle: Path) -> bool:
    return (path.is_file() or path.is_symlink()) and path != bundle / MANIFEST


def _entry(path: Path, bundle: Path) -> dict[str, Any]:
    name = str(path.relative_to(bundle))
    if path.is_symlink():
        return {"path": name, "link": str(path.readlink())}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"path": name, "size": path.stat().st_size, "sha256": digest.hexdigest()}
