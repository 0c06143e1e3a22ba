"""Many streams at once, from a process of their own: `python -m tests.process.load ADDR STREAMS CONNECTIONS TOKENS`.

Prints one JSON object: how many finished, the errors, seconds, and how many ran at the same time at most.
"""

import asyncio
import collections
import json
import resource
import sys
import time
from typing import Any

import grpc
import uvloop

from common.pb import backend_pb2_grpc as pb_grpc
from tests.models.script import line
from tests.process.wire import predict_options

OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))


async def run(addr: str, streams: int, connections: int, tokens: int) -> dict[str, Any]:
    """All of them start together, spread evenly over the connections."""
    channels = [grpc.aio.insecure_channel(addr, OPTIONS) for _ in range(connections)]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    errors: collections.Counter[str] = collections.Counter()
    open_now = most = finished = 0

    async def stream(number: int) -> None:
        nonlocal open_now, most, finished
        call = pb_grpc.BackendStub(channels[number % connections]).PredictStream(
            predict_options(line("long"), IgnoreEOS=True, Tokens=tokens)
        )
        last = None
        try:
            async for reply in call:
                if last is None:
                    open_now += 1
                    most = max(most, open_now)
                last = reply
        except grpc.aio.AioRpcError as error:
            errors[f"{error.code().name} {error.details()}"] += 1
            return
        open_now -= 1
        finished += last is not None and last.tokens == tokens

    started = time.monotonic()
    await asyncio.gather(*(stream(number) for number in range(streams)))
    seconds = time.monotonic() - started
    await asyncio.gather(*(channel.close() for channel in channels))
    return {"finished": finished, "errors": dict(errors), "seconds": seconds, "most": most}


if __name__ == "__main__":
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    address, *numbers = sys.argv[1:]
    count, over, length = map(int, numbers)
    print(json.dumps(uvloop.run(run(address, count, over, length))))
