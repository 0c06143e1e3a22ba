"""What the control groups of this process leave it: memory and processor time. Both versions of them are read."""

from collections.abc import Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def memory_left() -> int | None:
    """Bytes that can still be taken, with the file cache that the kernel would give up. None: no limit."""
    left = []
    for folder in _folders("memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            left.append(max(limit - max(used - _inactive_file(folder), 0), 0))
    return min(left, default=None)


def processors() -> float | None:
    """Seconds of processor time in a second, as `docker run --cpus` gives them. None: no limit."""
    quotas = []
    for folder in _folders("cpu"):
        words = _words(folder / "cpu.max")
        if not words:
            words = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _folders(controller: str) -> Iterator[Path]:
    """The groups of this process, from its own up to the one that is mounted, which is all that a container sees."""
    try:
        memberships = [line.split(":", 2) for line in _MEMBERSHIP.read_text(encoding="utf-8").splitlines()]
    except OSError:
        memberships = []
    roots = {"": _MOUNT, controller: _MOUNT / controller}
    for _, controllers, group in (each for each in memberships if len(each) == 3):
        for name in controllers.split(","):
            if name in roots:
                folder = roots[name] / group.strip("/")
                yield from (
                    each for each in (folder, *folder.parents) if each.is_relative_to(roots[name]) and each.is_dir()
                )
    yield from roots.values()


def _inactive_file(folder: Path) -> int:
    words = _words(folder / "memory.stat")
    facts = dict(zip(words[::2], words[1::2], strict=False))
    return int(facts.get("total_inactive_file") or facts.get("inactive_file") or 0)


def _number(*paths: Path) -> int | None:
    """The first that is there and is a number; version 1 has one beyond all memory where nothing is limited."""
    return next((int(words[0]) for path in paths if (words := _words(path)) and words[0].isdigit()), None)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return []
