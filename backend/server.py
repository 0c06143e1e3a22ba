"""Puts the grpc.aio server together: options, interceptors, services."""

from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from backend import accepting, completions, health
from backend.counters import Counters
from backend.flag_values import SettingsError
from backend.interceptors import Authentication, Counting, StatusMapping
from backend.lifecycle import Lifecycle
from backend.servicer import BackendServicer
from backend.settings import Settings
from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc

# Of all headers of a request together; ours stay below by `errors.MOST_BYTES`.
MOST_HEADER_BYTES = 16 * 1024
# On one connection. An orchestrator has few connections; how many requests run is not decided here.
MOST_STREAMS = 16_384
PING_MS = 60_000
PING_TIMEOUT_MS = 20_000
SERVICE = pb.DESCRIPTOR.services_by_name["Backend"].full_name


def build_server(
    settings: Settings,
    lifecycle: Lifecycle,
    counters: Counters | None = None,
    forwarding: grpc.aio.ServerInterceptor | None = None,
    *,
    is_private: bool = False,
) -> grpc.aio.Server:
    """The server with all its services, not yet listening; it counts into `counters`, where there are any.

    `forwarding` answers what another process is to answer. A server that `is_private` is asked by such processes alone,
    which have counted the RPC and looked at its token.

    Raises:
        SettingsError: channelz is asked for and not installed.

    """
    interceptors: list[grpc.aio.ServerInterceptor] = []
    if counters is not None and not is_private:
        # The outermost, so that the refused are counted too.
        interceptors.append(Counting(pb.DESCRIPTOR.services_by_name["Backend"], counters))
    if settings.auth_token and not is_private:
        interceptors.append(Authentication(settings.auth_token))
    if forwarding is not None:
        interceptors.append(forwarding)
    interceptors.append(StatusMapping(SERVICE, lifecycle.explained))
    # Those who pass requests on add a little to their headers.
    headers = 2 * MOST_HEADER_BYTES if is_private else MOST_HEADER_BYTES
    accepting.install()
    completions.install()
    server = grpc.aio.server(
        interceptors=interceptors,
        options=(
            # Two servers on one port would each get half of the calls; a bind that fails is heard of. With several
            # frontends that is what is wanted, and the port is tried before.
            ("grpc.so_reuseport", int(settings.frontends > 1)),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            # One limit: between gRPC's own two (8 and 16 KiB) it refuses by chance.
            ("grpc.max_metadata_size", headers),
            ("grpc.absolute_max_metadata_size", headers),
            ("grpc.max_concurrent_streams", MOST_STREAMS),
            # gRPC cancels calls that wait for Python, at random above 1000: a burst of so many is no overload.
            ("grpc.server.max_pending_requests", MOST_STREAMS),
            ("grpc.server.max_pending_requests_hard_limit", MOST_STREAMS),
            ("grpc.enable_channelz", int(settings.channelz)),
            # Clients may ping as they like, also between calls; gRPC would close their connection.
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client whose machine is gone says nothing; its requests must not run to their end.
            ("grpc.keepalive_time_ms", PING_MS),
            ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
            ("grpc.http2.max_pings_without_data", 0),
        ),
    )
    pb_grpc.add_BackendServicer_to_server(BackendServicer(lifecycle, counters), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(lifecycle), server)
    services = [SERVICE, health.SERVICE, reflection.SERVICE_NAME]
    if settings.channelz:
        services.append(_add_channelz(server))
    reflection.enable_server_reflection(services, server)
    return server


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What its port needs; None without TLS.

    Raises:
        SettingsError: a TLS file can't be used.

    """
    if settings.tls is None:
        return None
    from backend.tls import server_credentials

    return server_credentials(settings.tls)


def import_channelz() -> tuple[Any, Any]:
    """The modules of grpcio-channelz: the servicer's and the messages'.

    Raises:
        SettingsError: it is not installed.

    """
    try:
        from grpc_channelz.v1 import channelz, channelz_pb2
    except ImportError as error:
        msg = f"--channelz: needs the package grpcio-channelz; ./install.sh --extra channelz installs it ({error})"
        raise SettingsError(msg) from error
    return channelz, channelz_pb2


def _add_channelz(server: grpc.aio.Server) -> str:
    channelz, messages = import_channelz()
    channelz.add_channelz_servicer(server)
    return str(messages.DESCRIPTOR.services_by_name["Channelz"].full_name)
