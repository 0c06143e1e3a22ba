"""Machines in small: network namespaces on a bridge, each with a card and an address of its own.

What is started in one by `Node.argv` sees that card alone, and its process id is the program's own. The tests
themselves reach every node through the bridge.
"""

import contextlib
import ipaddress
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import psutil

_PREFIX = "vgb"
_NETWORKS = itertools.count()
_HOSTS = Path("/etc/netns")


def available() -> bool:
    """Whether this process may make network namespaces, and has what it takes."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    done = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "probe", "type", "bridge"], check=False, capture_output=True
    )
    return done.returncode == 0


class Node:
    """A namespace.

    Attributes:
        name: of the namespace, which `ip netns` knows.
        address, address6: its own, on the card `eth0`.

    """

    def __init__(self, name: str, address: str, address6: str) -> None:
        self.name = name
        self.address = address
        self.address6 = address6

    def argv(self, *command: str | Path) -> list[str]:
        """`command`, to be run in the node; the process becomes the command."""
        return ["ip", "netns", "exec", self.name, *map(str, command)]

    def run(self, *command: str) -> str:
        """What `command` prints, run in the node to its end."""
        return subprocess.run(self.argv(*command), check=True, capture_output=True, text=True).stdout

    def cut(self, card: str = "eth0") -> None:
        """Pull the cable: nothing goes through any more, and nobody is told."""
        _ip("-n", self.name, "link", "set", card, "down")

    def mend(self, card: str = "eth0") -> None:
        """Put it back; addresses of IPv6 went with it."""
        _ip("-n", self.name, "link", "set", card, "up")
        _ip("-n", self.name, "addr", "replace", f"{self.address6}/64", "dev", card, "nodad")

    def name_hosts(self, hosts: Mapping[str, str]) -> None:
        """Let programs that are started from now on know these names, by /etc/hosts of their own."""
        folder = _HOSTS / self.name
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in hosts.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n", encoding="ascii")

    def pids(self) -> list[int]:
        """The processes in it."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]


class Network:
    """Nodes on a bridge; a context manager that leaves nothing behind, processes in the nodes included.

    Attributes:
        nodes: in the order of their addresses.
        gateway: the address of the tests themselves.

    """

    def __init__(self, size: int, *, ipv6_only: bool = False) -> None:
        number = next(_NETWORKS)
        # A network of its own for each, and for each process of tests: two may run at a time.
        octet = 1 + (os.getpid() * 7 + number) % 250
        self._ipv6_only = ipv6_only
        self._bridge = f"{_PREFIX}{os.getpid():x}x{number:x}"
        subnet = ipaddress.ip_network(f"10.213.{octet}.0/24")
        self._subnet6 = f"fd00:213:{octet:x}:"
        self.gateway, *addresses = (str(address) for _, address in zip(range(size + 1), subnet.hosts(), strict=False))
        self.gateway6 = f"{self._subnet6}:fffe"
        self.nodes = [
            Node(f"{_PREFIX}{os.getpid():x}n{number:x}{index:x}", address, f"{self._subnet6}:{index + 1:x}")
            for index, address in enumerate(addresses)
        ]

    def __enter__(self) -> Self:
        _sweep()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("addr", "add", f"{self.gateway6}/64", "dev", self._bridge, "nodad")
        _ip("link", "set", self._bridge, "up")
        for index, node in enumerate(self.nodes):
            _ip("netns", "add", node.name)
            card = f"{self._bridge}v{index:x}"
            _ip("link", "add", card, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            _ip("link", "set", card, "master", self._bridge, "up")
            _ip("-n", node.name, "link", "set", "lo", "up")
            _ip("-n", node.name, "link", "set", "eth0", "up")
            _ip("-n", node.name, "addr", "add", f"{node.address6}/64", "dev", "eth0", "nodad")
            if not self._ipv6_only:
                _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
        return self

    def __exit__(self, *exc: object) -> None:
        for index, node in enumerate(self.nodes):
            _ip("link", "del", f"{self._bridge}v{index:x}")
            _remove(node.name)
        _ip("link", "del", self._bridge)


def _remove(name: str) -> None:
    """A namespace, with what runs in it and the names it knows."""
    left = [psutil.Process(int(pid)) for pid in _ip("netns", "pids", name).split() if psutil.pid_exists(int(pid))]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)
    _ip("netns", "del", name)
    shutil.rmtree(_HOSTS / name, ignore_errors=True)


def _sweep() -> None:
    """Remove what tests that were killed have left: names tell whose they are."""
    for name, owner in _owned(_ip("netns", "list")):
        if not psutil.pid_exists(owner):
            _remove(name)
    for name, owner in _owned(_ip("-o", "link", "show", "type", "bridge").replace(": ", " ")):
        if not psutil.pid_exists(owner):
            _ip("link", "del", name)


def _owned(listing: str) -> Iterator[tuple[str, int]]:
    for word in listing.split():
        if match := re.fullmatch(rf"{_PREFIX}([0-9a-f]+)[nx][0-9a-f]+", word):
            yield word, int(match[1], 16)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
