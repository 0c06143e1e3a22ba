"""What control groups leave a process, in both of their versions."""

from pathlib import Path

import pytest

from common import cgroup


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file system of a machine's control groups, empty, and a process in the group /system/backend."""
    mount = tmp_path / "cgroup"
    mount.mkdir()
    membership = tmp_path / "membership"
    membership.write_text("0::/system/backend\n")
    monkeypatch.setattr(cgroup, "_MOUNT", mount)
    monkeypatch.setattr(cgroup, "_MEMBERSHIP", membership)
    return mount


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_no_limit(group: Path) -> None:
    assert cgroup.memory_left() is None
    assert cgroup.processors() is None
    write(group, memory__max="max", memory__current="5", cpu__max="max 100000")
    assert cgroup.memory_left() is None
    assert cgroup.processors() is None


def test_a_container_sees_its_own_group_as_the_mount(group: Path) -> None:
    write(group, memory__max="50", memory__current="20", cpu__max="150000 100000")
    assert cgroup.memory_left() == 30
    assert cgroup.processors() == 1.5


def test_the_narrowest_of_the_groups_above_counts(group: Path) -> None:
    write(group / "system/backend", memory__max="90", memory__current="10", cpu__max="max 100000")
    write(group / "system", memory__max="100", memory__current="70", cpu__max="400000 100000")
    assert cgroup.memory_left() == 30
    assert cgroup.processors() == 4


def test_file_cache_can_be_taken(group: Path) -> None:
    write(group, memory__max="50", memory__current="45", memory__stat="anon 5\ninactive_file 35")
    assert cgroup.memory_left() == 40


def test_more_used_than_allowed(group: Path) -> None:
    write(group, memory__max="50", memory__current="60")
    assert cgroup.memory_left() == 0


@pytest.mark.parametrize("text", ["odd", "", "0 0"])
def test_what_is_no_limit_is_none(group: Path, text: str) -> None:
    write(group, memory__max=text or " ", memory__current="5", cpu__max=text)
    assert cgroup.processors() is None


def test_version_1(group: Path, tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    write(group / "memory/docker/x", memory__limit_in_bytes="100", memory__usage_in_bytes="30")
    write(group / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert cgroup.memory_left() == 70
    assert cgroup.processors() is None
    write(group / "cpu", cpu__cfs_quota_us="250000")
    assert cgroup.processors() == 2.5
