"""One input's way through a model that pools: admitted, encoded, and dropped by the engine when nobody waits for it."""

import contextlib
import uuid
from typing import Any

from vllm import PoolingParams
from vllm.outputs import PoolingRequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from common import request_context
from common.errors import ENGINE_STOPPING, EngineGone, Overloaded
from common.vllm_errors import ENGINE_ERROR


async def pool(
    llm: AsyncLLM,
    engine_input: Any,
    params: PoolingParams,
    request_id: str = "",
    *,
    lora_request: Any = None,
) -> PoolingRequestOutput:
    """What the model makes of one rendered input: `outputs.data` is a tensor, its shape by the task.

    Cancelling aborts the request. vLLM's exceptions pass; see `vllm_errors.translated`.

    Raises:
        EngineGone: the engine was shut down meanwhile.
        Overloaded: the engine had no room for it; it may have later.

    """
    last: PoolingRequestOutput | None = None
    outputs = llm.encode(
        engine_input,
        params,
        request_id or f"pool-{uuid.uuid4().hex}",
        lora_request=lora_request,
        trace_headers=request_context.trace_headers.get(),
    )
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            last = output
    if last is not None and last.error is not None:
        if last.error.retryable:
            raise Overloaded(last.error.message)
        raise RuntimeError(ENGINE_ERROR)
    if last is None or not last.finished or last.outputs.data is None:
        raise EngineGone(ENGINE_STOPPING)
    return last
