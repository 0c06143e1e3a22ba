"""A client to be killed: `python -m tests.chaos.crasher ADDR` opens streams, says a line once they flow, reads on."""

import asyncio
import sys

import grpc

from common.pb import backend_pb2_grpc as pb_grpc
from tests.models.script import line
from tests.process.wire import ENDLESS, predict_options

STREAMS = 4


async def crash(addr: str) -> None:
    """Read until somebody kills this process, or all streams have ended."""
    async with grpc.aio.insecure_channel(addr) as channel:
        stub = pb_grpc.BackendStub(channel)
        flows = [
            stub.PredictStream(predict_options(line("long"), **ENDLESS | {"Tokens": 1500})) for _ in range(STREAMS)
        ]
        await asyncio.gather(*(flow.read() for flow in flows), return_exceptions=True)
        print("flowing", flush=True)
        await asyncio.gather(*(_drink(flow) for flow in flows), return_exceptions=True)


async def _drink(flow: "grpc.aio.UnaryStreamCall[object, object]") -> None:
    async for _ in flow:
        pass


if __name__ == "__main__":
    asyncio.run(crash(sys.argv[1]))
