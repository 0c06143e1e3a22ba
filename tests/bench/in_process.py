"""`AsyncLLM` in a process whose only client is a loop of its own: `python -m tests.bench.in_process ENGINE_ARGS`.

The least that generating costs, which servers are compared with. Says `ready`, then answers each line of stdin, a `Job`
in JSON, with one of `tests.bench.observed.Observed`.
"""

import asyncio
import dataclasses
import json
import sys
import time
import uuid
from typing import Any

import uvloop

from common import orphan_watch
from common.vllm_env import prepare_environment
from tests.bench.observed import Observed, Stream, observed

if __name__ == "__mp_main__":  # an engine's process, which vLLM would leave behind
    orphan_watch.begin()


@dataclasses.dataclass(frozen=True)
class Job:
    """Requests that begin together: `streams` times `prompt`, for `tokens` tokens each, or for its embedding.

    `kind` is "stream", "unary" or "embed". The prompt is text as the engine gets it.
    """

    kind: str
    prompt: str
    streams: int
    tokens: int


class Loop:
    """One engine and those who ask it."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    async def play(self, job: Job) -> Observed:
        """Begin all requests at once, and see them through."""
        streams = [Stream() for _ in range(job.streams)]
        ask = self._embed if job.kind == "embed" else self._generate
        started = time.perf_counter()
        await asyncio.gather(*(ask(job, stream) for stream in streams))
        return observed(streams, started)

    async def _generate(self, job: Job, stream: Stream) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA if job.kind == "stream" else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(temperature=0.0, max_tokens=job.tokens, ignore_eos=True, output_kind=kind)
        (prompt,) = await self._llm.renderer.render_cmpl_async([{"prompt": job.prompt}])
        times, tokens = stream.times, 0
        async for output in self._llm.generate(prompt, params, uuid.uuid4().hex):
            times.append(time.perf_counter())
            tokens += len(output.outputs[0].token_ids)
        stream.ended = times[-1]
        stream.last = json.dumps([len(output.prompt_token_ids), tokens]).encode()

    async def _embed(self, job: Job, stream: Stream) -> None:
        from vllm import PoolingParams

        (prompt,) = await self._llm.renderer.render_cmpl_async([{"prompt": job.prompt}])
        async for output in self._llm.encode(prompt, PoolingParams(task="embed"), uuid.uuid4().hex):
            stream.last = json.dumps([len(output.prompt_token_ids), output.outputs.data.numel()]).encode()
        stream.ended = time.perf_counter()
        stream.times.append(stream.ended)


async def serve(engine_args: dict[str, Any]) -> None:
    """Load, then play job after job until stdin ends."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args))
    try:
        loop = Loop(llm)
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(dataclasses.asdict(await loop.play(Job(**json.loads(line))))), flush=True)
    finally:
        await asyncio.to_thread(llm.shutdown)


if __name__ == "__main__":
    orphan_watch.announce()
    # As run.sh has it for the servers: libraries for the engine, and vLLM's log on stderr, for stdout is for answers.
    prepare_environment()
    uvloop.run(serve(json.loads(sys.argv[1])))
