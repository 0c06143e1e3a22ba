"""`grpc.health.v1`, answered from the lifecycle's state.

"" and "backend.Backend"   SERVING until a drain begins or the engine dies: the process takes requests, LoadModel too
"backend.Backend/model"    SERVING while a model is loaded
"""

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from backend.lifecycle import Lifecycle, State

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
PROCESS = ("", "backend.Backend")
MODEL = "backend.Backend/model"

# After the last news a Watch stays open for so long: it must not hold up the end of the server, and a client that
# asks again at once must not keep it busy.
_FAREWELL_SECONDS = 0.5
_ENDING = (State.DRAINING, State.FAILED)
_Answer = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """Check, List and Watch; the state is looked at when it is asked for, so no answer is older than the question."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        self._changed = asyncio.Event()
        lifecycle.on_state(self._on_state)

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        """One answer; NOT_FOUND for a name that isn't known."""
        status = self._status(request.service)
        if status is None:
            known = ", ".join(f'"{name}"' for name in (*PROCESS, MODEL))
            # Not `context.abort`, see `interceptors`; the answer is not sent.
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details(f"service: unknown; use one of {known}")
        return _Answer(status=status)

    async def List(
        self, _request: health_pb2.HealthListRequest, _context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthListResponse:
        """What Check answers to each name that is known."""
        return health_pb2.HealthListResponse(
            statuses={name: _Answer(status=self._status(name)) for name in (*PROCESS, MODEL)}
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """An answer now and at each change, SERVICE_UNKNOWN for a name that isn't known; ends with the server."""
        told = None
        while True:
            changed, ending = self._changed, self._lifecycle.state in _ENDING
            status = self._status(request.service)
            if status is None:
                status = _Answer.SERVICE_UNKNOWN
            if status != told:
                await context.write(_Answer(status=status))
                told = status
            if ending:
                await asyncio.sleep(_FAREWELL_SECONDS)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            await changed.wait()

    def _status(self, service: str) -> Any:
        state = self._lifecycle.state
        if service in PROCESS:
            return _Answer.NOT_SERVING if state in _ENDING else _Answer.SERVING
        if service == MODEL:
            return _Answer.SERVING if state is State.READY else _Answer.NOT_SERVING
        return None

    def _on_state(self, _state: State) -> None:
        # Watches that wait have this one in hand; those that write at the moment will look again.
        self._changed.set()
        self._changed = asyncio.Event()
