"""Hostile clients against a server with the scripted model; docs/reliability.md says what is asked and what was found.

FUZZ_CASES says how many, FUZZ_SEED which, FUZZ_ONLY=hostile:17 or frames:100-200 runs nothing but those again.
"""

import asyncio
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fuzz import cases, http2
from tests.fuzz.cases import Case
from tests.fuzz.hostile import hostile, hostile_load
from tests.fuzz.messages import random_bytes
from tests.fuzz.runner import Runner, report
from tests.fuzz.wires import garbage, wrong_frames
from tests.models import ensure
from tests.models.script import line
from tests.process.orchestrator import Backend, Heart, eventually
from tests.process.test_lifecycle import plain
from tests.process.wire import PARSERS, model_options

CASES = int(os.environ.get("FUZZ_CASES", "3000"))
SEED = os.environ.get("FUZZ_SEED", "0")
ONLY = os.environ.get("FUZZ_ONLY", "")
CORPUS = Path(__file__).with_name("corpus")
# Nothing is fetched from anywhere, whatever a LoadModel names.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}
MOST_GROWTH = 64 * 2**20
LONG = 20_000
# After each the server is looked at.
BATCH = 1000 if CASES < LONG else 5000

# Of 1000 cases; the first four cost 1 ms each, a load 50 times that.
SHARES: dict[str, tuple[int, Callable[[random.Random], Case]]] = {
    "bytes": (150, garbage),
    "frames": (300, wrong_frames),
    "messages": (350, random_bytes),
    "hostile": (198, hostile),
    "load": (2, hostile_load),
}


def case_of(name: str) -> Case:
    """The case of this name, `kind:number`, always the same one for a seed."""
    return SHARES[name.partition(":")[0]][1](random.Random(f"{SEED}/{name}"))


def named(first: int, last: int) -> Iterator[tuple[str, Case]]:
    """Cases by number, of all kinds in turn."""
    kinds = [kind for kind, (share, _) in SHARES.items() for _ in range(share)]
    random.Random(0).shuffle(kinds)
    for number in range(first, last):
        name = f"{kinds[number % len(kinds)]}:{number}"
        yield name, case_of(name)


def corpus() -> list[tuple[str, Case]]:
    return [(f"corpus:{path.stem}", cases.read(path)) for path in sorted(CORPUS.glob("*.json"))]


def asked_for() -> Iterator[tuple[str, Case]]:
    kind, _, numbers = ONLY.partition(":")
    first, _, last = numbers.partition("-")
    for number in range(int(first), int(last or first) + 1):
        yield f"{kind}:{number}", case_of(f"{kind}:{number}")


@pytest.fixture(scope="module")
def bare() -> Iterator[Backend]:
    with Backend(env=ENVIRONMENT) as backend:
        backend.wait_for_health()
        yield backend


@pytest.fixture(scope="module")
def served(bare: Backend) -> Backend:
    assert bare.load(model_options(ensure("scripted"), *PARSERS)).success
    assert plain(bare) == line("plain").content
    return bare


def check(runner: Runner) -> None:
    outcome = runner.outcome
    print(f"FUZZ_SEED={SEED}\n{report(outcome)}")
    if outcome.findings:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        for name, case, what in outcome.findings:
            (folder / f"{name.replace(':', '-').replace(' ', '_')}.json").write_text(cases.saved(case, what[:300]))
        pytest.fail(
            f"{len(outcome.findings)} findings with FUZZ_SEED={SEED}; again with FUZZ_ONLY={outcome.findings[0][0]};"
            f" files for tests/fuzz/corpus are in {folder}"
        )


async def test_without_a_model(bare: Backend) -> None:
    """All that is known, and some cases, before anything is loaded."""
    async with Runner(bare) as runner:
        await runner.run(corpus())
        await runner.run(named(0, 1000))
    check(runner)


async def test_paths_that_are_no_text_while_vllm_is_imported() -> None:
    """Once each let go of memory that gRPC's core still wrote to; an import takes it for objects of its own."""
    case = cases.read(CORPUS / "path-not-utf8.json")
    assert isinstance(case, cases.Wire)
    with Backend(env=ENVIRONMENT) as backend:
        backend.wait_for_health()
        address = ("127.0.0.1", int(backend.addr.rpartition(":")[2]))
        sent = 0
        while backend.exit_status is None and "vLLM imported in" not in backend.stderr:
            with socket.create_connection(address, timeout=5) as connection:
                connection.sendall(b"".join(case.parts))
                connection.settimeout(5)
                while (
                    b"Method%20not%20found" not in (said := connection.recv(1000)) and b"Method not found" not in said
                ):
                    assert said
                sent += 1
        print(f"{sent} sent")
        assert sent > 10
        assert backend.exit_status is None
        backend.wait_for_health()


async def test_what_is_right_is_answered(bare: Backend) -> None:
    """The frames that the others are made from: they lead to an RPC, or nothing would be tested."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(bare.addr.rpartition(":")[2]))
    writer.write(b"".join(http2.frames_of("/backend.Backend/Health", b"")))
    said = b""
    while b"OK" not in said:
        piece = await reader.read(1 << 16)
        assert piece, said
        said += piece
    writer.close()


async def test_corpus(served: Backend) -> None:
    async with Runner(served) as runner:
        await runner.run(corpus())
    check(runner)


@pytest.mark.timeout(300 + CASES / 50)
async def test_cases(served: Backend) -> None:
    server = psutil.Process(served.pid)

    def held() -> tuple[int, int, int]:
        return served.rss(), server.num_fds(), server.num_threads()

    async with Runner(served) as runner:
        with Heart(served, "fuzzing", interval=0.5) as heart:
            if ONLY:
                await runner.run(asked_for())
                check(runner)
                return
            started = time.monotonic()
            warm = max(CASES // 5, 1000)
            for first in range(0, CASES, BATCH):
                if first <= warm < first + BATCH:
                    base = held()
                await runner.run(named(first, min(first + BATCH, CASES)))
                if runner.outcome.findings:
                    break
            seconds = time.monotonic() - started
    print(f"{CASES} cases in {seconds:.0f} s")
    check(runner)
    heart.check()
    assert plain(served) == line("plain").content
    eventually(lambda: server.num_fds() <= base[1] + 8, 30, "connections closed")
    after = held()
    print(f"RSS {base[0] / 2**20:.0f} -> {after[0] / 2**20:.0f} MiB, descriptors {base[1:]} -> {after[1:]}")
    if CASES >= LONG:  # caches and arenas are still filling in a short run
        assert after[0] - base[0] <= MOST_GROWTH
    assert after[2] <= base[2] + 8
