"""What every RPC passes through: first who is asking, then what becomes of its exceptions."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from backend.errors import status_of
from common.errors import InvalidRequest
from common.request_context import request_id

# Generic in its stubs, but not at run time.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]


class Authentication(grpc.aio.ServerInterceptor):
    """Refuses every RPC without the right bearer token, before its request is even deserialised.

    One `authorization` header is needed, exactly: of two, others on the way may have looked at the other one.
    """

    def __init__(self, token: str) -> None:
        self._expected = _digest(f"Bearer {token}")

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """See `grpc.aio.ServerInterceptor`."""
        given = [value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        if len(given) == 1 and hmac.compare_digest(_digest(given[0]), self._expected):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


def _digest(value: str | bytes) -> bytes:
    """As long for every value, since a comparison takes its time by the length."""
    return hashlib.sha256(value if isinstance(value, bytes) else value.encode(errors="surrogateescape")).digest()


class StatusMapping(grpc.aio.ServerInterceptor):
    """Turns exceptions of our own servicer into a gRPC status; `explained` may know better what happened."""

    def __init__(self, service: str, explained: Callable[[Exception], Awaitable[Exception]]) -> None:
        self._prefix = f"/{service}/"
        self._explained = explained

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        # Every method of the servicer is a coroutine; streams write to the context.
        if handler.request_streaming:
            factory, behaviour = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        elif handler.response_streaming:
            factory, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            factory, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        deserializer = _forgiving(handler.request_deserializer)
        return factory(_mapped(behaviour, self._explained), deserializer, handler.response_serializer)


class _Malformed:
    """Stands for a request whose bytes are no message of its type."""


_MALFORMED = InvalidRequest("request", "its bytes are not a message of this RPC's type")


def _forgiving(deserializer: Any) -> Any:
    """gRPC answers bytes that it can't read with UNKNOWN and logs a traceback; they are the caller's mistake."""

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return _Malformed

    return deserialize


def _mapped(behaviour: Any, explained: Callable[[Exception], Awaitable[Exception]]) -> Any:
    async def mapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _Malformed:
            await context.abort(*status_of(_MALFORMED))
        # Each RPC has a task, and so a context, of its own.
        request_id.set(getattr(request, "CorrelationId", ""))
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  # every exception gets a status
            await context.abort(*status_of(await explained(error)))

    return mapped


async def _refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong token in the authorization metadata")
