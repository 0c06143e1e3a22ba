"""What every RPC passes through: first who is asking, then what becomes of its exceptions."""

import hmac
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.message import DecodeError

from backend.errors import status_of
from common.errors import InvalidRequest

# Generic in its stubs, but not at run time.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]


class Authentication(grpc.aio.ServerInterceptor):
    """Refuses every RPC without the right bearer token, before its request is even deserialised."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """See `grpc.aio.ServerInterceptor`."""
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        given = given if isinstance(given, bytes) else given.encode()
        if hmac.compare_digest(given, self._expected):
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse)


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
        if handler is None:
            return None
        if not handler_call_details.method.startswith(self._prefix):
            return _readable(handler)
        # Every method of the servicer is a coroutine; streams write to the context.
        if handler.request_streaming:
            factory, behaviour = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        elif handler.response_streaming:
            factory, behaviour = grpc.unary_stream_rpc_method_handler, handler.unary_stream
        else:
            factory, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        deserializer = _forgiving(handler.request_deserializer)
        return factory(_mapped(behaviour, self._explained), deserializer, handler.response_serializer)


def _readable(handler: Any) -> "Handler":
    """A handler of gRPC's own services, with our answer to bytes that are no message."""
    if handler.request_deserializer is None:
        return cast("Handler", handler)
    deserializer = _forgiving(handler.request_deserializer)
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(
            _refusing_stream(handler.stream_stream), deserializer, handler.response_serializer
        )
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            _refusing_stream(handler.unary_stream), deserializer, handler.response_serializer
        )

    async def behaviour(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _Malformed:
            await context.abort(*status_of(_MALFORMED))
        answer = handler.unary_unary(request, context)
        return await answer if inspect.isawaitable(answer) else answer

    return grpc.unary_unary_rpc_method_handler(behaviour, deserializer, handler.response_serializer)


def _refusing_stream(behaviour: Any) -> Any:
    async def requests(given: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async for request in given:
            if request is _Malformed:
                await context.abort(*status_of(_MALFORMED))
            yield request

    async def refusing(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request is _Malformed:
            await context.abort(*status_of(_MALFORMED))
        answers = behaviour(requests(request, context) if hasattr(request, "__aiter__") else request, context)
        if inspect.isawaitable(answers):  # it writes to the context
            await answers
            return
        if hasattr(answers, "__aiter__"):
            async for answer in answers:
                await context.write(answer)
        else:
            for answer in answers:
                await context.write(answer)

    return refusing


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
        try:
            return await behaviour(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  # every exception gets a status
            await context.abort(*status_of(await explained(error)))

    return mapped


async def _refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong token in the authorization metadata")
