"""argv -> Settings -> run. Imports nothing heavy: the port must open before vLLM is imported."""

import asyncio
import functools
import logging
import os
import resource
import signal
import sys
import tempfile
from typing import TYPE_CHECKING, NoReturn

from backend.flag_values import SettingsError
from backend.logs import configure_logging
from backend.settings import Settings, parse_settings

if TYPE_CHECKING:
    import grpc

    from backend.ending import Ending
    from backend.lifecycle import Lifecycle

logger = logging.getLogger("backend")

# Sixty-four times the connections that the orchestrator has at most.
MOST_DESCRIPTORS = 65536


def main() -> None:
    """Run until a signal or the engine's death, or what another first argument asks for; never returns."""
    parent = os.getppid()
    if sys.argv[1:2] == ["chat"]:
        from backend import chat

        sys.exit(chat.main(sys.argv[2:]))
    if sys.argv[1:2] == ["worker"]:
        from backend import worker

        worker.main(sys.argv[2:])
    if sys.argv[1:2] == ["serve"]:
        from backend import follower

        follower.main(sys.argv[1:])
        sys.exit()
    if sys.argv[1:2] == ["plan"]:
        from backend import plan

        sys.exit(plan.main(sys.argv[2:]))
    from backend.shutdown import leave

    try:
        settings = parse_settings(sys.argv[1:])
        tempfile.gettempdir()  # vLLM's processes talk through sockets there
    except (SettingsError, OSError) as error:
        leave(2, str(error))
    configure_logging(settings.log_level, settings.log_format)
    # gRPC's core writes a line of its own for every handshake that fails, without being asked.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        if settings.check is not None:
            from backend import check

            leave(*check.run(settings))
        from backend.event_loop import run

        run(serve(settings, parent))
    except SettingsError as error:
        leave(2, str(error))


async def serve(settings: Settings, parent: int) -> NoReturn:
    """Serve until told to stop, or until the engine or the process `parent` dies; then end the process.

    Raises:
        SettingsError: the address can't be listened on, or a TLS file can't be used.

    """
    from backend import metrics_port
    from backend.counters import Counters
    from backend.ending import Ending
    from backend.lifecycle import Lifecycle
    from backend.parent_watch import watch_parent
    from backend.server import build_server, credentials
    from backend.shutdown import leave, shut_down
    from backend.sockets import is_local, listen
    from common.frontends import ALONE

    loop = asyncio.get_running_loop()
    processes = None
    if settings.frontends > 1:
        from backend.frontends import FrontendProcesses

        processes = FrontendProcesses(settings)
    frontends = processes or ALONE
    ending = Ending()
    lifecycle = Lifecycle(
        ending,
        shutdown_timeout=settings.shutdown_timeout,
        limits=settings.limits,
        scraped=settings.metrics_addr is not None,
        frontends=frontends,
    )
    _allow_many_connections()
    metrics = metrics_port.bind(settings.metrics_addr) if settings.metrics_addr else None
    counters = Counters() if metrics else None
    server = build_server(settings, lifecycle, counters)
    addr = listen(server, settings.addr, credentials(settings))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.ask)
    if settings.parent_watch is not None:

        def parent_is_gone(cause: str) -> None:
            loop.call_soon_threadsafe(lambda: ending.ask(cause, hurry=True))

        watch_parent(parent, settings.parent_watch, parent_is_gone)
    await server.start()
    private = None
    if processes is not None:
        private = build_server(settings, lifecycle, counters, is_private=True)
        listen(private, f"unix:{processes.socket}")
        await private.start()
        await processes.start(addr, lifecycle)
    logger.info("listening on %s", addr)
    if not settings.checks_clients and not is_local(addr):
        logger.warning(
            "whoever can reach %s can use this server: set LOCALAI_GRPC_AUTH_TOKEN, or --tls-client-ca with TLS", addr
        )
    if metrics and counters:
        others = functools.partial(processes.snapshots_in_thread, loop) if processes is not None else None
        metrics_port.serve_in_background(metrics, counters, lifecycle, others)
    lifecycle.import_in_background()

    cause = await _cause_of_end(lifecycle, ending, server)
    logger.info("stopping: %s", cause or "asked to")
    await shut_down(
        lifecycle,
        ending,
        server,
        drain_seconds=settings.drain_seconds,
        shutdown_timeout=settings.shutdown_timeout,
        frontends=frontends,
    )
    if private is not None:
        await private.stop(0)
    leave(1 if cause else 0, cause)


async def _cause_of_end(lifecycle: "Lifecycle", ending: "Ending", server: "grpc.aio.Server") -> str | None:
    """Wait for what ends the process; the cause, if it is a failure. A server that accepts nothing any more is one."""
    asked = asyncio.create_task(ending.asked())
    ended = asyncio.create_task(server.wait_for_termination())
    watching = asyncio.create_task(lifecycle.watch())
    await asyncio.wait([asked, ended], return_when=asyncio.FIRST_COMPLETED)
    watching.cancel()
    if asked.done():
        return asked.result()  # `ended` goes on: cancelled, it would take the server's own end with it
    return f"gRPC accepts no more calls: {ended.exception() or 'its server has ended'}"


def _allow_many_connections() -> None:
    """Each connection takes a descriptor, and many systems grant 1024 unless more is asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
    except (OSError, ValueError) as error:
        logger.warning("at most %d connections and files: %s", soft, error)


if __name__ == "__main__":
    main()
