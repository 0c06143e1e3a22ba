"""argv -> Settings -> run. Imports nothing heavy: the port must open before vLLM is imported."""

import asyncio
import logging
import os
import signal
import sys
import tempfile

from backend.settings import Settings, SettingsError, parse_settings

logger = logging.getLogger("backend")

# Requests in flight get this many seconds to finish after SIGTERM.
DRAIN_SECONDS = 2.0


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
        cause = uvloop.run(serve(settings))
    except SettingsError as error:
        _exit(2, str(error))
    _exit(1 if cause else 0, cause)


async def serve(settings: Settings) -> str | None:
    """Serve until told to stop; returns the cause where it is a failure.

    Raises:
        SettingsError: the address can't be listened on.

    """
    from backend.lifecycle import Lifecycle
    from backend.server import build_server, listen

    loop = asyncio.get_running_loop()
    lifecycle = Lifecycle(shutdown_timeout=settings.shutdown_timeout)
    server = build_server(settings, lifecycle)
    addr = listen(server, settings.addr)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.stop)
    await server.start()
    logger.info("listening on %s", addr)
    lifecycle.import_in_background()

    cause = await lifecycle.stopped()
    logger.info("stopping: %s", cause or "asked to")
    await server.stop(0 if cause else DRAIN_SECONDS)
    await lifecycle.close()
    return cause


def _exit(status: int, message: str | None) -> None:
    """Leave at once. The message is the last line on stderr, where the orchestrator looks for the cause."""
    if message:
        sys.stderr.write(f"backend: {' '.join(message.split())}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads inside vLLM's import or start would hold up a normal exit.
    os._exit(status)


if __name__ == "__main__":
    main()
