"""argv -> Settings -> run. Imports nothing heavy: the port must open before vLLM is imported."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, NoReturn

from backend.logs import configure_logging
from backend.settings import Settings, SettingsError, parse_settings

if TYPE_CHECKING:
    import grpc

logger = logging.getLogger("backend")

# Requests in flight get this many seconds to finish once the process is to end.
DRAIN_SECONDS = 2.0
# What killing an engine that won't shut down may take on top of its own timeout.
KILL_SECONDS = 2.0


def main() -> None:
    """Run until a signal or the engine's death; never returns."""
    if sys.argv[1:2] == ["chat"]:
        from backend import chat

        sys.exit(chat.main(sys.argv[2:]))
    try:
        settings = parse_settings(sys.argv[1:])
        tempfile.gettempdir()  # vLLM's processes talk through sockets there
    except (SettingsError, OSError) as error:
        _exit(2, str(error))
    configure_logging(settings.log_level, settings.log_format)
    # gRPC's core writes a line of its own for every handshake that fails, without being asked.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        if settings.check is not None:
            from backend import check

            _exit(*check.run(settings))
        import uvloop

        uvloop.run(serve(settings))
    except SettingsError as error:
        _exit(2, str(error))


async def serve(settings: Settings) -> NoReturn:
    """Serve until told to stop, or until the engine dies; then end the process.

    Raises:
        SettingsError: the address can't be listened on, or a TLS file can't be used.

    """
    from backend.lifecycle import Lifecycle
    from backend.server import build_server
    from backend.sockets import is_local, listen
    from common.processes import engine_processes, kill

    loop = asyncio.get_running_loop()
    lifecycle = Lifecycle(shutdown_timeout=settings.shutdown_timeout)
    server = build_server(settings, lifecycle)
    addr = listen(server, settings.addr, _credentials(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.stop)
    await server.start()
    logger.info("listening on %s", addr)
    if not settings.checks_clients and not is_local(addr):
        logger.warning(
            "whoever can reach %s can use this server: set LOCALAI_GRPC_AUTH_TOKEN, or --tls-client-ca with TLS", addr
        )
    lifecycle.import_in_background()

    cause = await lifecycle.stopped()
    logger.info("stopping: %s", cause or "asked to")
    lifecycle.drain()
    await server.stop(DRAIN_SECONDS)
    with contextlib.suppress(TimeoutError):
        # A load that hangs in a download has no processes to kill, and its thread can't be stopped.
        await asyncio.wait_for(lifecycle.free(), settings.shutdown_timeout + KILL_SECONDS)
    await kill(engine_processes())
    _exit(1 if cause else 0, cause)


def _credentials(settings: Settings) -> "grpc.ServerCredentials | None":
    if settings.tls is None:
        return None
    from backend.tls import server_credentials

    return server_credentials(settings.tls)


def _exit(status: int, message: str | None) -> NoReturn:
    """Leave at once. The message is the last line on stderr, where the orchestrator looks for the cause."""
    if message:
        sys.stderr.write(f"backend: {' '.join(message.split())}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads inside vLLM's import or start would hold up a normal exit.
    os._exit(status)


if __name__ == "__main__":
    main()
