"""Embedding against vLLM in process: `python -m tests.bench.embedding [--calls 256] [--rounds 15] [--dtype float32]`.

One engine with all-MiniLM-L6-v2 in this process. In turns, it gets texts by `AsyncLLM.encode`, all at once, and by as
many Embedding calls, all at once, from a client in a process of its own through the real server. Printed are the rates,
the median of the ratios of neighbouring turns, and, for a machine that others use as well, the ratio of the best turns.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time

import grpc
import uvloop

from common.vllm_env import prepare_environment

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
prepare_environment()

from backend.ending import Ending  # noqa: E402  # after the environment is prepared
from backend.lifecycle import Lifecycle  # noqa: E402
from backend.server import build_server  # noqa: E402
from backend.settings import parse_settings  # noqa: E402
from common.pb import backend_pb2 as pb  # noqa: E402
from common.pb import backend_pb2_grpc as pb_grpc  # noqa: E402
from tests.models import ensure  # noqa: E402

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "wizards", "brew", "coffee")


def texts(calls: int, words: int, turn: int) -> list[str]:
    """As many texts of so many words; those of one turn are like no others."""
    return [
        " ".join([str(turn), str(call), *(WORDS[(call + index) % len(WORDS)] for index in range(words - 2))])
        for call in range(calls)
    ]


async def client(addr: str, calls: int, words: int, connections: int) -> None:
    """For each line of stdin, the number of a turn, all calls at once; then a line with the seconds it took."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(addr, options) for _ in range(connections)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    stubs = [pb_grpc.BackendStub(channel) for channel in channels]
    while line := await asyncio.to_thread(sys.stdin.readline):
        requests = [pb.PredictOptions(Embeddings=text) for text in texts(calls, words, int(line))]
        started = time.perf_counter()
        results = await asyncio.gather(
            *(stubs[index % connections].Embedding(request) for index, request in enumerate(requests))
        )
        print(json.dumps(time.perf_counter() - started), flush=True)
        assert all(result.dim == len(result.embeddings) > 0 for result in results)


async def serve(calls: int, words: int, rounds: int, connections: int, dtype: str) -> None:
    """Load, serve, and measure both in turns."""
    from vllm import PoolingParams

    lifecycle = Lifecycle(Ending(), shutdown_timeout=15)
    lifecycle.import_in_background()
    await lifecycle.load(pb.ModelOptions(Model=str(ensure("minilm")), Embeddings=True, DType=dtype))
    server = build_server(parse_settings(["--addr", "127.0.0.1:0"]), lifecycle)
    addr = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    llm = lifecycle.model_for("")._engine.llm

    async def encode(text: str, name: str) -> None:
        (prompt,) = await llm.renderer.render_cmpl_async([{"prompt": text}])
        async for output in llm.encode(prompt, PoolingParams(task="embed"), name):
            assert output.outputs.data.numel() > 0

    async def in_process(turn: int) -> float:
        inputs = texts(calls, words, turn)
        started = time.perf_counter()
        await asyncio.gather(*(encode(text, f"{turn}-{index}") for index, text in enumerate(inputs)))
        return time.perf_counter() - started

    arguments = ["--client", addr, "--calls", str(calls), "--words", str(words), "--connections", str(connections)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.bench.embedding",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout

    async def through_grpc(turn: int) -> float:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{turn}\n".encode())
        return float(await process.stdout.readline())

    await in_process(0)
    await through_grpc(1)
    pairs = []
    for turn in range(rounds):
        # Whoever comes second finds the machine as the first one left it: they swap.
        order = [in_process, through_grpc] if turn % 2 else [through_grpc, in_process]
        seconds = {each: await each(10 + 2 * turn + place) for place, each in enumerate(order)}
        pairs.append((seconds[in_process], seconds[through_grpc]))
        print(f"encode {calls / pairs[-1][0]:7.0f}/s   Embedding {calls / pairs[-1][1]:7.0f}/s", flush=True)
    ratios = sorted(direct / ours for direct, ours in pairs)
    direct, ours = (min(seconds) for seconds in zip(*pairs, strict=True))
    print(
        f"{calls} calls at once, {words} words, {connections} connections, dtype {dtype or 'auto'}:"
        f" ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f});"
        f" the best turns {calls / direct:.0f}/s and {calls / ours:.0f}/s, ratio {direct / ours:.3f}"
    )
    process.stdin.close()
    await process.wait()
    await server.stop(None)
    await lifecycle.free()


def main() -> None:
    """Measure, or be the client of who does."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.embedding")
    parser.add_argument("--calls", type=int, default=256)
    parser.add_argument("--words", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--dtype", default="", help="as ModelOptions.DType")
    parser.add_argument("--client", metavar="ADDR", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        uvloop.run(client(given.client, given.calls, given.words, given.connections))
    else:
        uvloop.run(serve(given.calls, given.words, given.rounds, given.connections, given.dtype))


if __name__ == "__main__":
    main()
