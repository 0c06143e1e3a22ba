"""However the server dies, all that it has started is gone within 5 seconds, also in the midst of a load.

The moments of a load are drawn at random, a few in each run; ORPHAN_MOMENTS asks for more, ORPHAN_SEED for the same.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from common.pb import backend_pb2 as pb
from tests.process.orchestrator import Backend, eventually, name
from tests.process.test_lifecycle import Streams
from tests.process.wire import PARSERS, model_options

GONE_SECONDS = 5.0
MOMENTS = int(os.environ.get("ORPHAN_MOMENTS", "6"))
SEED = int(os.environ.get("ORPHAN_SEED", random.randrange(10**6)))
# A load takes about this long on two cores, counted from the moment its first process is there.
LOAD_SECONDS = 9.0


def check_all_gone(backend: Backend, how: str) -> None:
    started = time.monotonic()
    try:
        eventually(lambda: not backend.processes(), GONE_SECONDS, "all processes are gone")
    except TimeoutError:
        raise AssertionError(f"{how}: left are {[name(process) for process in backend.processes()]}") from None
    print(f"{how}: all gone after {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def killed_during(backend: Backend, options: pb.ModelOptions) -> Iterator[None]:
    """LoadModel on its way, so far that its first process is there; it fails with its server."""
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(backend.load, options)
        eventually(backend.children, 60, "a process of the load")
        yield
        error = load.exception(GONE_SECONDS)
        # A fast machine may have been done with it.
        assert error is None or (isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGKILL, False),
        (signal.SIGSEGV, True),
        pytest.param(signal.SIGKILL, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGSEGV, False, marks=pytest.mark.slow),
    ],
    ids=["server-9", "group-11", "group-9", "server-11"],
)
def test_server_that_is_killed_under_streams(scripted: Path, number: signal.Signals, to_group: bool) -> None:
    with Backend() as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        with Streams(backend) as streams:
            backend.processes()
            (backend.signal_group if to_group else backend.signal_leader)(number)
            assert backend.wait_for_exit(GONE_SECONDS) == -number
            check_all_gone(backend, f"{number.name} to the {'group' if to_group else 'server'}")
        streams.check_unavailable()


@pytest.mark.timeout(120 + 40 * MOMENTS)
def test_server_that_is_killed_at_any_moment_of_a_load(scripted: Path) -> None:
    generator = random.Random(SEED)
    print(f"ORPHAN_SEED={SEED}")
    # Half of them in the first second, when the processes have not imported vLLM yet.
    moments = [generator.uniform(0, 1.0 if turn % 2 else LOAD_SECONDS) for turn in range(MOMENTS)]
    for moment in moments:
        with Backend() as backend:
            backend.wait_for_health()
            with killed_during(backend, model_options(scripted, *PARSERS)):
                time.sleep(moment)
                backend.processes()
                backend.signal_leader(signal.SIGKILL)
                assert backend.wait_for_exit(GONE_SECONDS) == -signal.SIGKILL
                check_all_gone(backend, f"killed {moment:.2f} s into the load")
