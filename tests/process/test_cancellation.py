"""Clients that go away: the engine drops their requests at once, whenever and however it happens.

Whether an engine still works on a request that nobody waits for shows in the CPU time of its scheduling process, which
stands still when it has none (a worker spins for a while). STORM says how many clients go away in the storm.
"""

import asyncio
import itertools
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from common.pb import backend_pb2 as pb
from common.pb import backend_pb2_grpc as pb_grpc
from tests.models.script import line
from tests.process.orchestrator import Backend
from tests.process.test_lifecycle import plain
from tests.process.wire import ENDLESS, PARSERS, model_options, predict_options, raw

STORM = int(os.environ.get("STORM", "200"))
SEED = int(os.environ.get("STORM_SEED", random.randrange(10**6)))
AT_ONCE = 64
SEATS = 8  # requests that the engine runs at a time
DROPPED_SECONDS = 2.0
MOST_GROWTH = 10 * 2**20

# How a call ends that is left so, for who can see it.
END: dict[str, grpc.StatusCode | None] = {
    "cancel": grpc.StatusCode.CANCELLED,
    "deadline": grpc.StatusCode.DEADLINE_EXCEEDED,
    "disconnect": None,
}
# Levels above INFO, in our lines and in those of the engine's processes.
_LOUD = re.compile(r"^(?:\(\S+ pid=\d+\) )?(?:WARNING|ERROR|CRITICAL) |^Traceback", re.MULTILINE)


class Engine:
    """The engine, as its CPU time shows it: in cores."""

    def __init__(self, backend: Backend) -> None:
        (self._process,) = backend.engine_cores()
        self.idle = self.rate(1.0)

    def rate(self, seconds: float) -> float:
        before = sum(self._process.cpu_times()[:2])
        time.sleep(seconds)
        return float(sum(self._process.cpu_times()[:2]) - before) / seconds

    def works(self, rate: float) -> bool:
        return rate > self.idle + 0.1

    async def rests(self) -> float:
        """Wait until it does no more than when it was idle; returns the seconds that took."""
        started = time.monotonic()
        while self.works(rate := await asyncio.to_thread(self.rate, 0.3)):
            assert time.monotonic() - started < DROPPED_SECONDS, f"the engine still works: {rate:.2f} cores"
        return time.monotonic() - started


@pytest.fixture(scope="module")
def serving(scripted: Path) -> Iterator[Backend]:
    with Backend() as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS, f"--max-num-seqs:{SEATS}")).success
        assert plain(backend) == line("plain").content
        yield backend


@pytest.fixture(scope="module")
def engine(serving: Backend) -> Engine:
    engine = Engine(serving)
    print(f"an idle engine takes {engine.idle:.2f} cores")
    return engine


def channel(backend: Backend) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(backend.addr, (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)))


def endless(**fields: Any) -> pb.PredictOptions:
    return predict_options(line("long"), **(ENDLESS | fields))


def check_quiet(backend: Backend, since: int) -> None:
    assert _LOUD.findall(backend.stderr[since:]) == [], backend.stderr[since:]


async def go_away(connection: grpc.aio.Channel, call: Any, how: str) -> grpc.StatusCode | None:
    """Leave the call; returns how it ended where that can be seen."""
    if how == "disconnect":
        await connection.close()
        return None
    if how == "cancel":
        call.cancel()
    code: grpc.StatusCode = await call.code()
    return code


def test_the_measure_itself(serving: Backend, engine: Engine) -> None:
    """One request of one client is seen."""
    with serving.connection() as stub:
        call = stub.PredictStream(endless(), timeout=60)
        next(call)
        rate = engine.rate(0.3)
        call.cancel()
    print(f"an engine with one request takes {rate:.2f} cores")
    assert engine.works(rate)


POINTS = ("queued", "prefill", "first token", "mid", "end")


@pytest.mark.parametrize(
    ("point", "unary", "how"),
    list(itertools.product(POINTS, (False, True), ("cancel", "disconnect", "deadline"))),
    ids=lambda value: {True: "unary", False: "stream"}.get(value, value) if isinstance(value, bool) else value,
)
async def test_client_that_goes_away(serving: Backend, engine: Engine, point: str, unary: bool, how: str) -> None:
    since = len(serving.stderr)
    # A prompt as long as the context takes longest to prefill; an answer of 100 tokens ends while its client leaves.
    request = {"prefill": raw("fox " * 1500, **ENDLESS), "end": endless(Tokens=100)}.get(point, endless())
    # Seconds until the client goes; a stream is left by what it has brought.
    delay = {"queued": 0.3, "prefill": 0.005, "first token": 0.02, "mid": 0.3, "end": 0.4}[point]
    chunks = {"first token": 1, "mid": 40, "end": 95}.get(point, 0)
    async with channel(serving) as others, channel(serving) as connection:
        blockers = []
        if point == "queued":
            blockers = [pb_grpc.BackendStub(others).PredictStream(endless()) for _ in range(SEATS)]
            for blocker in blockers:
                await blocker.read()
        stub = pb_grpc.BackendStub(connection)
        call = (stub.Predict if unary else stub.PredictStream)(request, timeout=delay if how == "deadline" else 60)
        if how != "deadline":
            if unary or not chunks:
                await asyncio.sleep(delay)
            for _ in range(0 if unary else chunks):
                if await call.read() is grpc.aio.EOF:
                    break
        code = await go_away(connection, call, how)
        assert code is END[how] or (point == "end" and code is grpc.StatusCode.OK)
        for blocker in blockers:
            blocker.cancel()
    await engine.rests()
    await asyncio.to_thread(check_quiet, serving, since)


async def storm(backend: Backend, count: int, generator: random.Random) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def client() -> None:
        how = generator.choice(("cancel", "disconnect", "deadline"))
        chunks, seconds, unary = generator.randrange(60), generator.uniform(0.001, 1.0), generator.random() < 0.25
        async with places, channel(backend) as connection:
            stub = pb_grpc.BackendStub(connection)
            if unary:
                call = stub.Predict(endless(), timeout=seconds if how == "deadline" else 60)
                await asyncio.sleep(0 if how == "deadline" else seconds)
            else:
                call = stub.PredictStream(endless(), timeout=seconds if how == "deadline" else 60)
                try:
                    for _ in range(chunks):
                        await call.read()
                except grpc.aio.AioRpcError as error:
                    assert error.code() is END[how]  # noqa: PT017  # one of two ways
            code = await go_away(connection, call, how)
            assert code is END[how]

    await asyncio.gather(*(client() for _ in range(count)))


@pytest.mark.timeout(120 + STORM)
async def test_storm(serving: Backend, engine: Engine) -> None:
    generator = random.Random(SEED)
    since = len(serving.stderr)
    server = psutil.Process(serving.pid)
    await storm(serving, 100, generator)  # what grows once, has grown
    await engine.rests()
    before = serving.rss(), server.num_fds(), server.num_threads()
    started = time.monotonic()
    await storm(serving, STORM, generator)
    seconds = time.monotonic() - started
    dropped = await engine.rests()
    after = serving.rss(), server.num_fds(), server.num_threads()
    growth = after[0] - before[0]
    print(
        f"STORM_SEED={SEED}: {STORM} clients went away in {seconds:.1f} s, the engine rested {dropped:.1f} s later;"
        f" RSS {growth / 2**20:+.1f} MiB, descriptors {before[1]} -> {after[1]}, threads {before[2]} -> {after[2]}"
    )
    assert growth <= MOST_GROWTH
    assert after[1] - before[1] <= 2
    await asyncio.to_thread(check_quiet, serving, since)
    assert await asyncio.to_thread(plain, serving) == line("plain").content
