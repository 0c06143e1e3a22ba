"""A machine that has nothing: a root folder with the C library, a shell, and what the kernel shows of itself.

There is no Python in it, no compiler, no `ls`, no user and no network. It is entered by chroot. Whoever makes one is in
namespaces of his own (`make test-bundle` sees to that), so that its mounts end with him.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

USER = 4242
_LIBC = re.compile(
    r"(ld-linux.*|libc|libm|libmvec|libdl|libpthread|librt|libutil|libresolv|libanl|libnss_\w+)\.so\.\d+"
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


class Bare:
    """A root folder below `folder`; its programs run as a user that no file knows.

    Attributes:
        root: the folder that is `/` in there.

    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        for name in ("proc", "sys", "dev", "tmp", "usr/bin", "usr/lib", "usr/lib64", "models"):
            (self.root / name).mkdir(parents=True)
        (self.root / "tmp").chmod(0o1777)
        for name in ("bin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        listing = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
        for name, path in re.findall(r"^\s+(\S+) \(.*\) => (/lib/\S+|/lib64/\S+|/usr/lib/\S+)$", listing, re.MULTILINE):
            if _LIBC.fullmatch(name) and "32/" not in path:
                self._copy(path)
        interpreter = Path("/lib64/ld-linux-x86-64.so.2")
        if interpreter.exists():
            self._copy(str(interpreter))
        shutil.copyfile("/bin/sh", self.root / "usr/bin/sh")
        (self.root / "usr/bin/sh").chmod(0o755)
        mount("-t", "proc", "proc", self.root / "proc")
        mount("--rbind", "/sys", self.root / "sys")
        mount("-t", "tmpfs", "tmpfs", self.root / "dev")
        (self.root / "dev/shm").mkdir()
        (self.root / "dev/shm").chmod(0o1777)
        for name in _DEVICES:
            (self.root / "dev" / name).touch()
            mount("--bind", f"/dev/{name}", self.root / "dev" / name)

    @contextlib.contextmanager
    def lying(self, folder: Path, where: str) -> Iterator[Path]:
        """Let `folder` lie at the path `where` of this machine, read-only, while the block runs."""
        place = self.root / where.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        mount("--bind", folder, place)
        mount("-o", "remount,ro,bind", place)
        try:
            yield place
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)
            place.rmdir()

    def argv(self, *command: str, **environment: str) -> list[str]:
        """The command line that runs `command` in there, with an environment of just that."""
        assignments = [f"{name}={value}" for name, value in environment.items()]
        enter = ["/usr/sbin/chroot", f"--userspec={USER}:{USER}", str(self.root)]
        return ["/usr/bin/env", "-i", *assignments, *enter, *command]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command to its end."""
        argv = self.argv(*command, **environment)
        return subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", timeout=120)

    def _copy(self, path: str) -> None:
        target = self.root / "usr" / path.lstrip("/").removeprefix("usr/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def mount(*arguments: str | Path) -> None:
    """mount(8)."""
    subprocess.run(["mount", *arguments], check=True)


def is_private() -> bool:
    """Whether `unshare` was called: the only network is a loopback of our own. Mounts are as private then."""
    return os.getuid() == 0 and [name for _, name in socket.if_nameindex()] == ["lo"]


def loopback() -> None:
    """Switch on 127.0.0.1 in a network namespace that is new."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("16xH", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))
