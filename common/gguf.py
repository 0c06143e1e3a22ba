"""Makes the folder that a GGUF file is served from, in a process of its own: memory goes with it, and so does a caller.

    VLLM_CACHE_ROOT/gguf/
      NAME-KEY/             complete; KEY stands for the file's path, size and time
      .NAME-KEY.lock        held (flock) by the process that makes it
      .NAME-KEY.partial/    being made, or left by a process that was killed; the next one starts over

Only a rename puts a folder in place. It is locked too, shared, while an engine loads from it: whoever converts a newer
version of the file removes the old one unless that is so.
"""

import asyncio
import contextlib
import fcntl
import logging
import multiprocessing
import os
import shutil
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from common import gguf_conversion, orphan_watch
from common.concurrency import to_its_end
from common.cpu_defaults import GIB, available_memory
from common.engine_log import StageClock
from common.errors import LoadFailed
from common.gguf_plan import GGUFPlan
from common.wording import in_bytes

logger = logging.getLogger(__name__)

_SPAWN = multiprocessing.get_context("spawn")
_END_SECONDS = 5.0
# What a conversion takes besides the weights: PyTorch, transformers and the vocabulary.
_OWN_BYTES = GIB // 2


@contextlib.asynccontextmanager
async def in_place(plan: GGUFPlan | None, clock: StageClock) -> AsyncIterator[None]:
    """Have the folder of `plan` in place while the block runs; makes it where it is not there. None: nothing to do.

    Cancelling ends the conversion and removes what there is of it.

    Raises:
        LoadFailed: the file can't be converted; the text says why.

    """
    if plan is None:
        yield
        return
    if plan.made:
        logger.info("load: %s was converted before: %s", plan.source, plan.folder)
    while (held := _hold(plan.folder)) is None:
        if plan.native:
            logger.info("load: the configuration and the tokenizer of %s are written to %s", plan.source, plan.folder)
        else:
            made = f"{in_bytes(plan.size)} as {plan.stored_as}"
            logger.info("load: %s is converted, once, into %s: %s", plan.source, plan.folder, made)
        _check_memory(plan)
        await _make(plan, clock)
    try:
        yield
    finally:
        os.close(held)


def _hold(folder: str) -> int | None:
    """An open descriptor that keeps the folder from being removed; None where it is not there."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # it is being removed
        os.close(held)
        return None
    if os.path.isdir(folder):
        return held
    os.close(held)
    return None


def _check_memory(plan: GGUFPlan) -> None:
    """Raise LoadFailed where the weights would not fit: the kernel might end the server instead."""
    needed, free = plan.size + _OWN_BYTES, available_memory()
    if free < needed and not plan.native:
        raise LoadFailed(f"{plan.source} takes {in_bytes(needed)} of memory to convert, {in_bytes(free)} are free")


async def _make(plan: GGUFPlan, clock: StageClock) -> None:
    orphan_watch.announce()
    receiver, sender = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(
        target=gguf_conversion.run,
        args=(plan.source, plan.folder, None if plan.native else plan.stored_as, sender),
        name="gguf-conversion",
        daemon=True,
    )
    clock.enter("converting GGUF: starting")
    try:
        await to_its_end(asyncio.to_thread(process.start))
        sender.close()
        problem = await _follow(receiver, clock)
    finally:
        await to_its_end(asyncio.to_thread(_end, process, plan.folder))
        sender.close()
        receiver.close()
    if problem is None and not plan.made:
        problem = f"the process that did it ended with status {process.exitcode}, perhaps for want of memory"
    if problem is not None:
        raise LoadFailed(f"{plan.source} can't be converted: {problem}")


async def _follow(receiver: Connection, clock: StageClock) -> str | None:
    """Follow the conversion to its end; what it failed of, if it said so."""
    while True:
        try:
            kind, text = await asyncio.to_thread(receiver.recv)
        except (EOFError, OSError):
            return None
        if kind == gguf_conversion.PROBLEM:
            return str(text)
        if kind == gguf_conversion.WARNING:
            logger.warning("load: %s", text)
        else:
            clock.enter(f"converting GGUF: {text}")


def _end(process: BaseProcess, folder: str) -> None:
    """Wait for the process, kill it where it does not end by itself, and remove what a killed one leaves."""
    if process.pid is None:
        return
    if os.path.isdir(folder):
        process.join(_END_SECONDS)
    process.kill()
    process.join()
    lock, partial = gguf_conversion.beside(Path(folder))
    with contextlib.suppress(OSError), lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where another process is at it
        shutil.rmtree(partial, ignore_errors=True)
