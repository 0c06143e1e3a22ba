"""What the engine's processes write to stderr while they start: passed on, followed for progress, kept for the cause.

vLLM has no progress API, and a failed start raises only "Engine core initialization failed. See root cause above":
both the stages and the root cause exist in the children's output alone.
"""

import collections
import contextlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

KEPT_LINES = 1000
MOST_CAUSE_LINES = 8

# vLLM's prefix, `(EngineCore pid=12) ERROR 11-21 03:38:02 [core.py:1510] `; its tracebacks carry it on every line.
_PREFIX = re.compile(r"^(?:\(\S+ pid=\d+\) )?(?:(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \S+ \S+ \[\S+\] )?")
_EXCEPTION = re.compile(
    r"^(?P<name>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failed))(?:: (?P<text>.*))?$"
)
# Exceptions that only say that another process failed.
_WRAPPERS = (
    "WorkerProc initialization failed",
    "Engine core initialization failed",
    "Failed core proc",
    "Executor failed",
    "cancelled",
)
# Lines that a dying process leaves without an exception.
_LAST_WORDS = re.compile(
    r"Worker proc \S+ died unexpectedly.*|Fatal Python error: .*"
    r"|.*\b(?:Segmentation fault|out of memory|Killed|Aborted)\b.*",
    re.IGNORECASE,
)

# The first line of a child that matches a pattern starts the stage. In the order in which vLLM goes through them.
STAGES = (
    ("starting the engine process", re.compile(r"Initializing a V1 LLM engine")),
    ("starting the workers", re.compile(r"world_size=\d+ rank=0 ")),
    ("loading weights", re.compile(r"Starting to load model")),
    ("preparing the KV cache", re.compile(r"Loading weights took|Model loading took")),
    ("compiling and warming up", re.compile(r"KV cache size:|Compiling a graph|Capturing CUDA graph")),
    ("finishing", re.compile(r"init engine \(profile, create kv cache, warmup model\) took")),
)


def _closed_by(undo: contextlib.ExitStack, descriptor: int) -> int:
    undo.callback(os.close, descriptor)
    return descriptor


class EngineLog:
    """A context in which file descriptor 2 is a pipe, so that processes started inside write to it.

    A thread passes every line on to the real stderr. On exit our own stderr is restored; the children keep the pipe,
    and the thread ends when the last of them does.
    """

    def __init__(self, on_stage: Callable[[str], None] = lambda _stage: None) -> None:
        self._on_stage = on_stage
        self._pending_stages = list(STAGES)
        self._lines: collections.deque[tuple[float, str]] = collections.deque(maxlen=KEPT_LINES)
        self._stderr = -1

    def __enter__(self) -> Self:
        # All that may fail comes before stderr is another: a pipe that nobody reads holds up who writes to it.
        with contextlib.ExitStack() as undo:
            self._stderr = _closed_by(undo, os.dup(2))
            read_end, write_end = (_closed_by(undo, end) for end in os.pipe())
            passed_on = _closed_by(undo, os.dup(2))
            self._thread = threading.Thread(
                target=self._follow, args=(read_end, passed_on), name="engine-log", daemon=True
            )
            self._thread.start()
            undo.pop_all()
        os.dup2(write_end, 2)
        os.close(write_end)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.dup2(self._stderr, 2)
        os.close(self._stderr)

    def lines(self, wait: float = 0.0, seconds: float = math.inf) -> list[str]:
        """The last `KEPT_LINES` lines, not older than `seconds`, after up to `wait` seconds for the children to end."""
        self._thread.join(wait)
        oldest = time.monotonic() - seconds
        return [line for written, line in list(self._lines) if written >= oldest]

    def forget(self) -> None:
        """Drop the lines so far: after a start that went well they are no cause of anything."""
        self._lines.clear()

    def _follow(self, read_end: int, stderr: int) -> None:
        with open(read_end, encoding="utf-8", errors="replace", newline="\n") as source:
            for line in source:
                _write_all(stderr, line.encode())
                text = line.rstrip("\n")
                self._lines.append((time.monotonic(), text))
                self._notice_stage(text)
        os.close(stderr)

    def _notice_stage(self, line: str) -> None:
        if line.startswith("(MainProcess "):
            return
        for position, (stage, pattern) in enumerate(self._pending_stages):
            if pattern.search(line):
                del self._pending_stages[: position + 1]
                self._on_stage(stage)
                return


class StageClock:
    """Which stage a load is in, and since when."""

    waiting: tuple[str, ...] = ()
    """Ranks of other machines that the load waits for, each with the line that starts it."""

    def __init__(self, on_finished: Callable[[str, float], None]) -> None:
        self._on_finished = on_finished
        self._stage: str | None = None
        self._since = self._start = time.monotonic()

    def enter(self, stage: str | None) -> None:
        """End the present stage, reporting its name and seconds, and begin `stage` (None: the load is over)."""
        now = time.monotonic()
        if self._stage is not None:
            self._on_finished(self._stage, now - self._since)
        self._stage, self._since = stage, now

    @property
    def stage(self) -> str | None:
        """The stage the load is in; None before the first and after the last."""
        return self._stage

    @property
    def seconds(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self._start


def root_cause(lines: Iterable[str]) -> str | None:
    """The first exception that is not a report of another process's failure: `ValueError: No available memory`.

    Returns None where the processes left none. Workers write before the core that reports on them, and Python
    prints a chain of exceptions from its origin on, so first is innermost. Later lines of a message are kept.
    """
    cause: list[str] = []
    last_words = None
    source = ""
    for raw in lines:
        prefix = _PREFIX.match(raw)
        head = prefix.group() if prefix else ""
        line = raw[len(head) :]
        if cause:
            if head != source or not line.strip() or line.startswith(("Process ", "Traceback ")):
                break
            cause.append(line.strip())
        elif (match := _EXCEPTION.match(line)) and not (match["text"] or "").startswith(_WRAPPERS):
            cause, source = [line.strip()], head
        elif last_words is None and _LAST_WORDS.fullmatch(line):
            last_words = line.strip()
    return " ".join(cause[:MOST_CAUSE_LINES]) or last_words


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError:
            return  # nobody reads our stderr any more; the engine must not stop for that
