"""argv -> Settings -> run. Imports nothing heavy: the port must open before vLLM is imported."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from typing import NoReturn

from backend.settings import Settings, SettingsError, parse_settings

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
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level.upper(),
        format="%(levelname)s %(asctime)s [%(name)s] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    import uvloop

    try:
        uvloop.run(serve(settings))
    except SettingsError as error:
        _exit(2, str(error))


async def serve(settings: Settings) -> NoReturn:
    """Serve until told to stop, or until the engine dies; then end the process.

    Raises:
        SettingsError: the address can't be listened on.

    """
    from backend import metrics_port
    from backend.counters import Counters
    from backend.lifecycle import Lifecycle
    from backend.server import build_server, listen
    from common.processes import engine_processes, kill

    loop = asyncio.get_running_loop()
    lifecycle = Lifecycle(shutdown_timeout=settings.shutdown_timeout)
    metrics = metrics_port.bind(settings.metrics_addr) if settings.metrics_addr else None
    counters = Counters() if metrics else None
    server = build_server(settings, lifecycle, counters)
    addr = listen(server, settings.addr)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.stop)
    await server.start()
    logger.info("listening on %s", addr)
    if metrics and counters:
        metrics_port.serve_in_background(metrics, counters, lifecycle)
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
