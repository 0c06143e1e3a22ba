"""Puts the grpc.aio server together: options, interceptors, services, and the socket it listens on."""

import errno
import os
import socket
import stat

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from backend.counters import Counters
from backend.interceptors import Authentication, Counting, StatusMapping
from backend.lifecycle import Lifecycle
from backend.servicer import BackendServicer
from backend.settings import Settings, SettingsError
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc

MOST_PATH_BYTES = 107  # unix(7)
SERVICE = pb.DESCRIPTOR.services_by_name["Backend"].full_name


def build_server(settings: Settings, lifecycle: Lifecycle, counters: Counters | None = None) -> grpc.aio.Server:
    """The server with all its services, not yet listening; it counts into `counters`, where there are any."""
    interceptors: list[grpc.aio.ServerInterceptor] = []
    if counters is not None:
        interceptors.append(Counting(pb.DESCRIPTOR.services_by_name["Backend"], counters))
    if settings.auth_token:
        interceptors.append(Authentication(settings.auth_token))
    interceptors.append(StatusMapping(SERVICE))
    server = grpc.aio.server(
        interceptors=interceptors,
        options=(
            # Two servers on one port would each get half of the calls; a bind that fails is heard of.
            ("grpc.so_reuseport", 0),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
        ),
    )
    pb_grpc.add_BackendServicer_to_server(BackendServicer(lifecycle, counters), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    services = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(services, server)
    return server


def listen(server: grpc.aio.Server, addr: str) -> str:
    """Bind `addr` (as `Settings.addr`) and return it with the port that was taken.

    Raises:
        SettingsError: with the system's reason, which gRPC's own error lacks.

    """
    _check_bindable(addr)
    try:
        port = server.add_insecure_port(addr)
    except RuntimeError as error:
        msg = f"cannot listen on {addr}: {error}"
        raise SettingsError(msg) from error
    return addr if addr.startswith("unix:") else f"{addr.rpartition(':')[0]}:{port}"


def _check_bindable(addr: str) -> None:
    try:
        if addr.startswith("unix:"):
            _check_socket_path(addr.removeprefix("unix:").removeprefix("//"))
            return
        host, _, port = addr.rpartition(":")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            with socket.socket(family, kind, protocol) as probe:
                # As gRPC binds: connections of a former server that linger don't count.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        msg = f"cannot listen on {addr}: {reason}"
        raise SettingsError(msg) from error


def _check_socket_path(path: str) -> None:
    """gRPC removes a socket file that is in its way, also one that another server listens on."""
    if len(os.fsencode(path)) > MOST_PATH_BYTES:
        raise OSError(errno.ENAMETOOLONG, f"a socket's path has at most {MOST_PATH_BYTES} bytes")
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
