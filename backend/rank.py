"""One life of a follower's ranks: `run.sh serve ...` and every process that comes of it."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from common import engine_sockets
from common.processes import engine_processes, kill, outlive_trackers, remove_registrations


class Rank:
    """A running `run.sh serve`; the only thing that this process has started, next to tools that end by themselves."""

    def __init__(self, process: asyncio.subprocess.Process, folder: "tempfile.TemporaryDirectory[str]") -> None:
        self._process = process
        self._folder = folder
        self.pid = process.pid

    @classmethod
    async def start(cls, program: Path, argv: Sequence[str], environment: Mapping[str, str]) -> Self:
        """Start `program` in a process group of its own: a terminal's Ctrl-C comes once, from us.

        Raises:
            OSError: it can't be started.

        """
        folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        try:
            process = await asyncio.create_subprocess_exec(
                program, *argv, env={engine_sockets.VARIABLE: folder.name, **environment}, process_group=0
            )
        except BaseException:
            folder.cleanup()
            raise
        return cls(process, folder)

    async def wait(self) -> int:
        """Its exit status as a shell gives it: 128 and the number where a signal ended it."""
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    def processes(self) -> list[psutil.Process]:
        """All that there are of it."""
        return engine_processes()

    def signal(self, number: int) -> None:
        """Pass a signal on to vLLM's main process, which ends the others."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self) -> None:
        """Kill every process of it, at once: one that is asked first could still talk to the next head."""
        # Not their group: Python's resource tracker is in it, which removes their shared memory once they are gone.
        self.signal(signal.SIGKILL)
        # What a process started while the others were killed is there at the next look.
        while left := [process for process in engine_processes() if process.pid != self.pid]:
            await kill(left)
        await self._process.wait()
        await outlive_trackers()
        await asyncio.to_thread(_reap)
        remove_registrations()
        self._folder.cleanup()


def _reap() -> None:
    """Wait for the dead whose parent we became when theirs died."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.status() == psutil.STATUS_ZOMBIE:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child.pid, os.WNOHANG)
