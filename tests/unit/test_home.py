"""A process whose user has no folder gets one."""

import getpass
import os
import tempfile
from pathlib import Path

import pytest

from common.home import ensure_home


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_one_that_can_be_used_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary))
    ensure_home()
    assert os.environ["HOME"] == str(temporary)
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("home", ["/nonexistent", "relative"])
def test_a_private_one_and_the_same_each_time(temporary: Path, monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    monkeypatch.setenv("HOME", home)
    ensure_home()
    chosen = Path(os.environ["HOME"])
    assert chosen.parent == temporary
    assert chosen.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", home)
    ensure_home()
    assert Path(os.environ["HOME"]) == chosen


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_nobody_elses_trap_is_walked_into(temporary: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    trap = temporary / f"vllm-grpc-backend-{os.getuid()}"
    if kind == "link":
        trap.symlink_to(temporary)
    elif kind == "file":
        trap.touch()
    else:
        trap.mkdir()
        trap.chmod(0o777)
    monkeypatch.setenv("HOME", "/nonexistent")
    ensure_home()
    chosen = Path(os.environ["HOME"])
    assert chosen.parent == temporary
    assert chosen != trap


def test_a_user_that_no_file_knows_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr(getpass, "getuser", unknown)
    monkeypatch.setenv("USER", "")
    ensure_home()
    assert os.environ["USER"] == f"uid{os.getuid()}"
