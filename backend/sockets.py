"""The address a server listens on: bound, or refused with the system's reason."""

import errno
import ipaddress
import os
import socket
import stat
from typing import Any

import grpc

from backend.flag_values import SettingsError
from common.private_folders import MOST_SOCKET_PATH_BYTES

# Everyone else's permissions are taken off a socket as it is made: a chmod would come a moment too late.
_PRIVATE = 0o177
# An address that this machine lacks, such as ::1 where IPv6 is switched off and /etc/hosts has it for localhost.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def listen(
    server: grpc.aio.Server, addr: str, credentials: grpc.ServerCredentials | None = None, *, is_shared: bool = False
) -> str:
    """Bind `addr` (as `Settings.addr`) and return it with the port that was taken; `is_shared`: by us already.

    A `unix:` socket has mode 0600; gRPC removes its file when the server stops. Call while no other thread makes files.

    Raises:
        SettingsError: with the system's reason, which gRPC's own error lacks.

    """
    if not is_shared:
        check_bindable(addr)
    umask = os.umask(_PRIVATE)
    try:
        port = server.add_insecure_port(addr) if credentials is None else server.add_secure_port(addr, credentials)
    except RuntimeError as error:
        msg = f"cannot listen on {addr}: {error}"
        raise SettingsError(msg) from error
    finally:
        os.umask(umask)
    return addr if addr.startswith("unix:") else f"{addr.rpartition(':')[0]}:{port}"


def check_bindable(addr: str) -> None:
    """Return where `addr` could be listened on just now.

    Raises:
        SettingsError: with the system's reason.

    """
    try:
        if addr.startswith("unix:"):
            _check_socket_path(addr.removeprefix("unix:").removeprefix("//"))
            return
        _check_host(addr)
    except OSError as error:
        reason = error.strerror or str(error)
        msg = f"cannot listen on {addr}: {reason}"
        raise SettingsError(msg) from error


def is_local(addr: str) -> bool:
    """Whether only processes of this machine can connect to `addr`; a host that can't be resolved is not local."""
    if addr.startswith("unix:"):
        return True
    try:
        found = resolved(addr)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


def resolved(addr: str) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, Any]]:
    """What can be bound for a `HOST:PORT` or `[IPv6]:PORT`: family, kind, protocol and address, one or more.

    Raises:
        OSError: the host is not known, or its name can't be one.

    """
    host, _, port = addr.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:
        # Of Python's codec for names: an empty label, or one of more than 63 characters.
        raise socket.gaierror(socket.EAI_NONAME, "the host name is malformed") from None
    return [(family, kind, protocol, address) for family, kind, protocol, _, address in found]


def _check_host(addr: str) -> None:
    """gRPC listens on those of a name's addresses that it can; one is enough."""
    absent: list[OSError] = []
    found = resolved(addr)
    for family, kind, protocol, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC binds: connections of a former server that linger don't count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            absent.append(error)
    if len(absent) == len(found):
        raise absent[0]


def _check_socket_path(path: str) -> None:
    """gRPC removes a socket file that is in its way, also one that another server listens on."""
    if len(os.fsencode(path)) > MOST_SOCKET_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {MOST_SOCKET_PATH_BYTES} bytes")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, f"no folder {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"folder {folder} is not writable")
    if os.path.islink(path) and not os.path.exists(path):
        raise FileExistsError(errno.EEXIST, "a link that leads nowhere has this name")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "a file that is no socket has this name")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return  # left behind by a server that is gone
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
