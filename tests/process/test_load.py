"""Many clients at once, and clients that do not read. LOAD_STREAMS asks for more streams than CI has time for."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import REPOSITORY, RUN_SH, Backend, Heart, connect, eventually
from tests.process.test_cancellation import Engine
from tests.process.test_lifecycle import plain
from tests.process.wire import ENDLESS, PARSERS, model_options, predict_options

STREAMS = int(os.environ.get("LOAD_STREAMS", "200"))
TOKENS = 32
SLOW = 16
FAST = 8
FAST_TOKENS = 300
# Flow control holds 64 KiB for a stream, and what the engine merges is no longer than the answer.
MOST_GROWTH = SLOW * 2**20
# The machine is shared with the client and the engine; a reader who is held up would wait for tens of seconds.
MOST_SLOWER = 2.0


@pytest.fixture(scope="module")
def serving(scripted: Path) -> Iterator[Backend]:
    with Backend() as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        assert plain(backend) == line("plain").content
        yield backend


def load(backend: Backend, streams: int, connections: int, tokens: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.process.load", backend.addr, *map(str, (streams, connections, tokens))],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(120 + STREAMS)
@pytest.mark.parametrize("connections", [1, STREAMS])
def test_many_streams_at_once(serving: Backend, connections: int) -> None:
    with Heart(serving, f"{STREAMS} streams on {connections} connections") as heart:
        found = load(serving, STREAMS, connections, TOKENS)
    heart.check()
    rate = STREAMS * TOKENS / found["seconds"]
    print(f"{found['finished']} streams in {found['seconds']:.1f} s, {found['most']} of them at once, {rate:.0f} tok/s")
    assert found["errors"] == {}
    assert found["finished"] == STREAMS


@contextlib.contextmanager
def neighbours(backend: Backend, *, reading: bool) -> Iterator[list[Any]]:
    """`SLOW` streams on one connection, which read all that comes, or nothing."""
    with connect(backend.addr) as stub:
        calls = [stub.PredictStream(predict_options(line("long"), **ENDLESS)) for _ in range(SLOW)]
        threads = []
        if reading:

            def drink(call: Any) -> None:
                with contextlib.suppress(Exception):  # cancelled in the end
                    for _ in call:
                        pass

            threads = [threading.Thread(target=drink, args=(call,), daemon=True) for call in calls]
            for thread in threads:
                thread.start()
        try:
            yield calls
        finally:
            for call in calls:
                call.cancel()
            for thread in threads:
                thread.join()


def test_who_does_not_read_holds_up_nobody(serving: Backend) -> None:
    seconds = {}
    for reading in (True, False):
        with neighbours(serving, reading=reading):
            time.sleep(0.5)
            seconds[reading] = load(serving, FAST, FAST, FAST_TOKENS)["seconds"]
    print(
        f"{FAST} streams of {FAST_TOKENS} tokens beside {SLOW} that read: {seconds[True]:.1f} s,"
        f" beside {SLOW} that do not: {seconds[False]:.1f} s"
    )
    assert seconds[False] <= seconds[True] * MOST_SLOWER


def test_who_does_not_read_costs_no_memory(serving: Backend) -> None:
    engine = Engine(serving)

    with neighbours(serving, reading=True):  # what grows once, has grown
        time.sleep(3)
    before = serving.rss()
    with neighbours(serving, reading=False) as calls:
        eventually(lambda: not engine.works(engine.rate(0.5)), 180, "the engine is done with all of them")
        growth = serving.rss() - before
        with Heart(serving, f"{SLOW} answers that nobody reads"):
            time.sleep(1)
        # Nothing is lost on one who reads after all.
        replies = list(calls[0])
    print(f"{SLOW} answers of {ENDLESS['Tokens']} tokens that nobody reads: RSS {growth / 2**20:+.1f} MiB")
    assert replies[-1].tokens == ENDLESS["Tokens"]
    assert growth <= MOST_GROWTH


def test_more_connections_than_the_soft_limit_of_files(tmp_path: Path) -> None:
    run_sh = tmp_path / "run.sh"
    run_sh.write_text(f'#!/bin/bash\nulimit -Sn 128\nexec "{RUN_SH}" "$@"\n')
    run_sh.chmod(0o755)
    with Backend(run_sh=run_sh) as backend, contextlib.ExitStack() as stack:
        backend.wait_for_health()
        soft, hard = psutil.Process(backend.pid).rlimit(psutil.RLIMIT_NOFILE)
        print(f"soft limit of open files: 128 at the start, then {soft} of {hard}")
        for _ in range(300):
            stub = stack.enter_context(connect(backend.addr))
            assert stub.Health(pb.HealthMessage(), timeout=10).message == b"OK"
