"""vLLM takes seconds to import, and the process answers meanwhile."""

import asyncio
import importlib
import logging
import threading
import time
from typing import Any

from common import spare
from common.errors import LoadFailed
from common.vllm_env import prepare_environment

logger = logging.getLogger(__name__)


def import_in_thread(name: str, imported: asyncio.Future[Any], *, with_spare: bool = True) -> None:
    """Import the module `name`, which imports vLLM, in a thread that never holds up the process's exit.

    `with_spare`, a process for the first engine does the same meanwhile, see `common.spare`. Call in the main thread.
    `imported` gets the module, or LoadFailed with what kept it from being imported.
    """
    loop = imported.get_loop()

    prepare_environment()
    if with_spare:
        spare.start()

    def run() -> None:
        started = time.monotonic()
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # LoadModel answers with it
            logger.exception("vLLM can't be imported")
            loop.call_soon_threadsafe(imported.set_exception, LoadFailed(f"vLLM can't be imported: {error}"))
            return
        logger.info("vLLM imported in %.1f s", time.monotonic() - started)
        loop.call_soon_threadsafe(imported.set_result, module)

    threading.Thread(target=run, name="import-vllm", daemon=True).start()
