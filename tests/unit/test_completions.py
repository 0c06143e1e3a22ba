"""What `backend.completions` changes of grpc.aio, in a process of its own, since grpc.aio begins once in each."""

import json
import subprocess
import sys

CALLS = 300

SCRIPT = f"""
import asyncio, json, os, threading
import grpc
from backend import completions

async def main():
    completions.install()
    policies = [os.sched_getscheduler(thread.native_id) for thread in threading.enumerate()]
    reads, read = [], os.read
    def counted(descriptor, most):
        data = read(descriptor, most)
        reads.append(len(data))
        return data
    completions.os.read = counted
    async def echo(request, context):
        await asyncio.sleep(0.05)
        return request
    server = grpc.aio.server()
    methods = {{"Echo": grpc.unary_unary_rpc_method_handler(echo)}}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        call = channel.unary_unary("/test/Echo")
        answers = await asyncio.gather(*(call(str(i).encode()) for i in range({CALLS})))
    await server.stop(None)
    print(json.dumps([policies, len(reads), sum(reads), [a.decode() for a in answers]]))

asyncio.run(main())
"""


def test_all_that_is_done_is_heard_of_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True, timeout=60)
    policies, reads, completed, answers = json.loads(done.stdout)
    assert answers == [str(number) for number in range(CALLS)]
    assert completed >= 4 * CALLS  # of each call what it received and sent, on both ends
    assert reads < completed / 2
    assert sorted(policies) == [0, 3]  # SCHED_OTHER for the main thread, SCHED_BATCH for the one that waits
