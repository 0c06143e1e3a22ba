"""The last words of the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAVE = "import sys; from backend.shutdown import leave; leave(int(sys.argv[1]), sys.argv[2] or None)"


def leave(status: int, message: str, stderr: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LEAVE, str(status), message],
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [(0, "", ""), (1, "the engine died:\n  no memory", "backend: the engine died: no memory\n")],
)
def test_last_words(status: int, message: str, said: str) -> None:
    with leave(status, message, subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.read() == said
    assert process.returncode == status


def test_stderr_that_nobody_reads_any_more() -> None:
    read, write = os.pipe()
    os.close(read)
    with leave(3, "words", write) as process:
        os.close(write)
        assert process.wait(20) == 3
