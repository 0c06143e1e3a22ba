"""The generated stubs fit the installed protobuf and grpcio and are made from the proto as it is."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "common" / "pb"
NAMES = ("backend_pb2.py", "backend_pb2.pyi", "backend_pb2_grpc.py")


def test_the_protobuf_runtime_takes_the_stubs() -> None:
    gencode = written_in("backend_pb2.py", r"^# Protobuf Python Version: (\S+)$")
    runtime = Version(version("protobuf"))
    assert gencode <= runtime, f"stubs of protobuf {gencode} on the older runtime {runtime}: import fails"
    assert runtime.major - gencode.major <= 1, f"stubs of protobuf {gencode} are too old for runtime {runtime}"


def test_grpcio_takes_the_stubs() -> None:
    gencode = written_in("backend_pb2_grpc.py", r"^GRPC_GENERATED_VERSION = '(\S+)'$")
    runtime = Version(version("grpcio"))
    assert gencode <= runtime, f"stubs of grpcio-tools {gencode} on the older grpcio {runtime}: import fails"


def test_the_stubs_are_fresh(tmp_path: Path) -> None:
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-Icommon/pb=proto",
        *outputs,
        "common/pb/backend.proto",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    fresh = tmp_path / "common" / "pb"
    assert {path.name for path in fresh.iterdir()} == set(NAMES)
    stale = [name for name in NAMES if (STUBS / name).read_bytes() != (fresh / name).read_bytes()]
    assert not stale, f"made from another proto or by another generator, make them anew: {', '.join(stale)}"


def written_in(name: str, pattern: str) -> Version:
    found = re.search(pattern, (STUBS / name).read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        pytest.fail(f"common/pb/{name} names no version that matches {pattern}")
    return Version(found[1])
