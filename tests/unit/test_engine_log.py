"""What the engine's processes write: passed on, followed for stages, searched for the cause of a failure."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from common.engine_log import KEPT_LINES, STAGES, EngineLog, StageClock, root_cause

WORKER = "(Worker_TP0 pid=22) ERROR 11-21 03:38:02 [multiproc_executor.py:953] "
CORE = "(EngineCore pid=12) ERROR 11-21 03:38:03 [core.py:1510] "
DYING = "(EngineCore pid=12) "
FRAMES = (
    "Traceback (most recent call last):",
    '  File "/site/vllm/v1/x.py", line 5, in run',
    "    self.start(kind=ValueError)",
    "         ^^^^^^^^^^^^^^^^^^^^^^",
)


def lines(prefix: str, *texts: str) -> list[str]:
    return [prefix + text for text in texts]


def raised(prefix: str, *message: str) -> list[str]:
    return lines(prefix, *FRAMES, *message)


BANNER = [
    "(EngineCore pid=12) INFO 11-21 03:38:00 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: x",
    "(EngineCore pid=12) WARNING 11-21 03:38:00 [cpu.py:5] Error: this is no exception, and ValueError neither",
]
CORE_FAILED = [
    *lines(CORE, "EngineCore failed to start."),
    *raised(CORE, "ValueError: No available memory for the cache blocks."),
    *lines(DYING, "Process EngineCore:"),
    *raised(DYING, "ValueError: No available memory for the cache blocks."),
]
WORKER_FAILED = [
    *lines(WORKER, "WorkerProc failed to start."),
    *raised(WORKER, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    "(Worker_TP0 pid=22) INFO 11-21 03:38:02 [multiproc_executor.py:843] Parent process exited, terminating",
    *lines(CORE, "EngineCore failed to start."),
    *raised(CORE, "Exception: WorkerProc initialization failed due to an exception in a background process."),
    *lines(DYING, "Process EngineCore:"),
    *raised(DYING, "Exception: WorkerProc initialization failed due to an exception in a background process."),
]


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ([], None),
        (BANNER, None),
        (BANNER + CORE_FAILED, "ValueError: No available memory for the cache blocks."),
        (BANNER + WORKER_FAILED, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
        # Only the traceback that Python itself writes.
        (raised(DYING, "KeyError: 'lm_head.weight'"), "KeyError: 'lm_head.weight'"),
        (raised("", "ImportError: libcuda.so.1: cannot open"), "ImportError: libcuda.so.1: cannot open"),
        (raised(CORE, "AssertionError"), "AssertionError"),
        (raised(CORE, "a.b_c._d.ValidationError: bad"), "a.b_c._d.ValidationError: bad"),
        # A chain: what came first is what went wrong.
        (
            raised(CORE, "FileNotFoundError: no such file: 'x'")
            + lines(CORE, "", "The above exception was the direct cause of the following exception:", "")
            + raised(CORE, "RuntimeError: could not load"),
            "FileNotFoundError: no such file: 'x'",
        ),
        # A message of several lines.
        (
            raised(CORE, "ValueError: Model architectures ['X'] are not supported.", "  Use one of:", "  A, B", "")
            + lines(CORE, "more"),
            "ValueError: Model architectures ['X'] are not supported. Use one of: A, B",
        ),
        (
            raised(DYING, "ValueError: first", "second", "third"),
            "ValueError: first second third",
        ),
        # Another process writes in between.
        (
            [*raised(CORE, "ValueError: first"), "(Worker_TP1 pid=23) something else", *lines(CORE, "not of it")],
            "ValueError: first",
        ),
        # The same process goes on with something else.
        (
            [*raised(CORE, "ValueError: first"), "(EngineCore pid=12) INFO 11-21 03:38:03 [core.py:9] shutting down"],
            "ValueError: first",
        ),
        # Reports of other processes' failures are no cause.
        (raised(CORE, "RuntimeError: Engine core initialization failed. See root cause above."), None),
        (raised("", "RuntimeError: Engine core initialization failed. Failed core proc(s): {'x': 1}"), None),
        # Last words without an exception.
        (
            [*BANNER, "Fatal Python error: Segmentation fault", "", "Current thread 0x1 (most recent call first):"],
            "Fatal Python error: Segmentation fault",
        ),
        ([*BANNER, "(EngineCore pid=12) Segmentation fault (core dumped)"], "Segmentation fault (core dumped)"),
        ([*BANNER, "oom-kill: Killed process 12 (VLLM::EngineCor)"], "oom-kill: Killed process 12 (VLLM::EngineCor)"),
        (
            ["terminate called after throwing an instance of 'std::bad_alloc'", "Aborted (core dumped)"],
            "Aborted (core dumped)",
        ),
        # A worker that was killed: what the others raise about it comes later and says less.
        (
            [
                *lines(CORE, "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"),
                *raised(CORE, "RuntimeError: cancelled"),
                *raised(CORE, "RuntimeError: Executor failed."),
            ],
            "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)",
        ),
        # An exception says more than they do.
        (["Aborted", *raised(CORE, "ValueError: bad")], "ValueError: bad"),
    ],
)
def test_root_cause(output: list[str], cause: str | None) -> None:
    assert root_cause(output) == cause


def test_a_long_message_is_cut() -> None:
    output = raised(CORE, "ValueError: 0", *(str(number) for number in range(1, 100)))
    assert root_cause(output) == "ValueError: 0 1 2 3 4 5 6 7"


STAGE_LINES = {
    "starting the engine process": BANNER[0],
    "starting the workers": "(EngineCore pid=12) INFO 11-21 03:38:01 [parallel_state.py:9] world_size=1 rank=0 local",
    "loading weights": "(EngineCore pid=12) INFO 11-21 03:38:01 [model_runner.py:9] Starting to load model /m ...",
    "preparing the KV cache": "(EngineCore pid=12) INFO 11-21 03:38:02 [x.py:9] Loading weights took 0.10 seconds",
    "compiling and warming up": "(EngineCore pid=12) INFO 11-21 03:38:02 [x.py:9] GPU KV cache size: 1,024 tokens",
    "finishing": "(EngineCore pid=12) INFO 11-21 03:38:03 [core.py:9] init engine (profile, create kv cache, warmup "
    "model) took 1.2 seconds",
}


def stages_of(*output: str) -> list[str]:
    """What a log reports for these lines, written by a child process."""
    seen: list[str] = []
    with EngineLog(seen.append) as log:
        subprocess.run(
            [sys.executable, "-c", "import sys; sys.stderr.write(sys.argv[1])", "\n".join(output)], check=True
        )
    log.lines(wait=10)
    return seen


def test_every_stage_has_a_line() -> None:
    assert list(STAGE_LINES) == [stage for stage, _ in STAGES]


def test_stages() -> None:
    output = [line for stage in STAGE_LINES.values() for line in (stage, "(EngineCore pid=12) noise", stage)]
    assert stages_of(*output) == list(STAGE_LINES)


def test_stages_only_go_forward_and_may_be_left_out() -> None:
    order = ("loading weights", "starting the workers", "finishing", "compiling and warming up")
    assert stages_of(*(STAGE_LINES[stage] for stage in order)) == ["loading weights", "finishing"]


def test_our_own_lines_start_no_stage() -> None:
    ours = STAGE_LINES["loading weights"].replace("(EngineCore pid=12)", "(MainProcess pid=12)")
    assert stages_of(ours) == []


def child(code: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", f"import os, sys, time; {code}"])


def test_a_childs_lines_are_kept_and_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with EngineLog() as log:
        with child("os.write(2, 'first\\nsecond é\\n'.encode() + b'\\xff\\nno line end')") as process:
            process.wait()
        os.write(2, b"\nours\n")
    assert log.lines(wait=10) == ["first", "second é", "\N{REPLACEMENT CHARACTER}", "no line end", "ours"]
    os.write(2, b"after\n")
    assert "after" not in log.lines()
    assert capfd.readouterr().err == "first\nsecond é\n\N{REPLACEMENT CHARACTER}\nno line end\nours\nafter\n"


def test_a_child_that_lives_on_is_still_followed(capfd: pytest.CaptureFixture[str]) -> None:
    with EngineLog() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "import os; os.write(2, b'early\\n'); input(); os.write(2, b'late\\n')"],
            stdin=subprocess.PIPE,
        )
        wait_until(lambda: log.lines() == ["early"])
    started = time.monotonic()
    assert log.lines(wait=0.05) == ["early"]
    assert time.monotonic() - started < 5
    process.communicate(b"\n")
    assert log.lines(wait=10) == ["early", "late"]
    assert capfd.readouterr().err == "early\nlate\n"


def test_one_that_cannot_begin_changes_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    ends: dict[int, int] = {}
    make = os.pipe

    def pipe() -> tuple[int, int]:
        made = make()
        ends.update((end, os.fstat(end).st_ino) for end in made)
        return made

    monkeypatch.setattr(os, "pipe", pipe)
    with pytest.raises(RuntimeError, match="new thread"):
        EngineLog().__enter__()
    assert len(ends) == 2
    for end, pipe_id in ends.items():
        with contextlib.suppress(OSError):  # closed, or something else's by now
            assert os.fstat(end).st_ino != pipe_id
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"


def test_lines_can_be_forgotten() -> None:
    with EngineLog() as log:
        os.write(2, b"ValueError: tried something else\n")
        wait_until(lambda: log.lines() != [])
        log.forget()
        assert log.lines() == []
        os.write(2, b"RuntimeError: died\n")
    assert root_cause(log.lines(wait=10)) == "RuntimeError: died"


def test_old_lines_can_be_left_out() -> None:
    with EngineLog() as log:
        os.write(2, b"ValueError: survived\n")
        wait_until(lambda: log.lines() != [])
        time.sleep(0.3)
        os.write(2, b"RuntimeError: died\n")
    assert root_cause(log.lines(wait=10, seconds=0.2)) == "RuntimeError: died"
    assert "survived" in (root_cause(log.lines()) or "")


def test_only_the_last_lines_are_kept() -> None:
    with EngineLog() as log:
        for number in range(KEPT_LINES + 5):
            os.write(2, f"{number}\n".encode())
    assert log.lines(wait=10) == [str(number) for number in range(5, KEPT_LINES + 5)]


def test_no_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with EngineLog() as log:
            os.write(2, b"x\n")
        log.lines(wait=10)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_exception_in_the_body_restores_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), EngineLog():
        raise RuntimeError
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_clock() -> None:
    finished: list[tuple[str, float]] = []
    clock = StageClock(lambda stage, seconds: finished.append((stage, seconds)))
    assert clock.stage is None
    clock.enter("one")
    assert clock.stage == "one"
    assert finished == []
    time.sleep(0.02)
    clock.enter("two")
    clock.enter(None)
    assert clock.stage is None
    assert [stage for stage, _ in finished] == ["one", "two"]
    assert finished[0][1] >= 0.02
    assert clock.seconds >= sum(seconds for _, seconds in finished)
