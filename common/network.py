"""Which address and which network card the ranks of several machines talk through; chosen before vLLM reads them.

vLLM takes the card on the way to the internet, and torch's gloo whatever the host's own name resolves to, often
127.0.0.1. Neither need be where the other machines are. The card here is the one that the route to them leads through.
"""

import dataclasses
import ipaddress
import logging
import os
import socket
from collections.abc import Mapping

import psutil

from common.errors import InvalidRequest

logger = logging.getLogger(__name__)

HOST_IP = "VLLM_HOST_IP"
GLOO = "GLOO_SOCKET_IFNAME"
NCCL = "NCCL_SOCKET_IFNAME"
# What the user says about them, if anything.
_GIVEN = {name: value for name in (HOST_IP, GLOO, NCCL) if (value := os.environ.get(name))}


@dataclasses.dataclass(frozen=True)
class Route:
    """How this machine reaches another one."""

    address: str
    """Ours, on the card that leads there."""
    interface: str
    """The card's name; empty where no card has the address."""

    def variables(self) -> dict[str, str]:
        """What vLLM, gloo and NCCL are told of it. NCCL takes a prefix, unless told that the name is whole."""
        cards = {GLOO: self.interface, NCCL: f"={self.interface}"} if self.interface else {}
        return {HOST_IP: self.address} | cards


def use_route_to(host: str) -> None:
    """Set the variables that the user has not set, for processes that start from now on, by the route to `host`.

    `host` is an address or a name, of this machine where it is the head itself. An empty one takes back what an
    earlier call has set. What is used is logged, with a warning where others than our own machines may reach it.

    Raises:
        InvalidRequest: the name is not known, or no route leads there.

    """
    for name in {HOST_IP, GLOO, NCCL} - _GIVEN.keys():
        os.environ.pop(name, None)
    if not host:
        return
    route = route_to(host)
    chosen = route.variables() | _GIVEN
    os.environ.update(chosen)
    why = f"{', '.join(sorted(_GIVEN))} as given, the rest" if _GIVEN else "chosen"
    logger.info("network: %s, %s by the route to %s", _spelled(chosen), why, host)
    if is_loopback(host):
        logger.warning("network: other machines can't reach a head at %s", host)
    # Torch's store, where nodes meet, listens on all of them.
    if exposed := sorted(filter(is_public, {host, route.address, chosen[HOST_IP], *interfaces()})):
        logger.warning(
            "network: vLLM's channels between machines listen on %s, unencrypted and open to everybody who can"
            " reach it: use machines of a private network, or a firewall",
            ", ".join(exposed),
        )


def route_to(host: str) -> Route:
    """Our address and card on the way to `host`; of `host` itself, where that is ours.

    Raises:
        InvalidRequest: the name is not known, or no route leads there.

    """
    problem: OSError | None = None
    for family, address in _addresses(host):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))  # nothing is sent
            except OSError as error:
                problem = error
                continue
            ours = probe.getsockname()[0]
        return Route(ours, interfaces().get(ours, ""))
    raise InvalidRequest("address", f"no route to {host}: {problem}")


def own_address(host: str) -> str:
    """The address to listen on where the other machines are told `host`, which may be a name.

    vLLM's channels listen on addresses only. Of several the one that a card of this machine has.

    Raises:
        InvalidRequest: the name is not known.

    """
    found = [address for _, address in _addresses(host)]
    ours = interfaces()
    return next((address for address in found if address in ours), found[0])


def ipv6_address(host: str) -> str | None:
    """The address of a name that has IPv6 addresses only; None for addresses, other names and unknown ones."""
    try:
        found = _addresses(host)
    except InvalidRequest:
        return None
    only = all(family == socket.AF_INET6 for family, _ in found)
    return found[0][1] if only and found[0][1] != host else None


def is_public(address: str) -> bool:
    """Whether others than our own networks may reach it: routed in the internet, or all of a machine's addresses.

    False for what is no address.
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return parsed.is_global or parsed.is_unspecified


def is_loopback(host: str) -> bool:
    """Whether no other machine can reach it."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def interfaces() -> dict[str, str]:
    """The names of this machine's cards, by their addresses."""
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _addresses(host: str) -> list[tuple[int, str]]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise InvalidRequest("address", f"{host!r} is neither an address nor a known name: {error}") from error
    return [(family, str(sockaddr[0])) for family, _, _, _, sockaddr in found]


def _spelled(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items())
