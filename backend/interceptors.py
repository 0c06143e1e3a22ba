"""What every RPC passes through: it is counted; then who is asking; then what becomes of its exceptions."""

import asyncio
import hashlib
import hmac
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, cast

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from backend.accepting import UNKNOWN_PATH
from backend.counters import Counters
from backend.deserializing import Unread, forgiving
from backend.errors import status_of
from common.request_context import request_id

# Generic in its stubs, but not at run time.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]]

# A label that callers could fill with words of their own would grow without end.
UNKNOWN_METHOD = "unknown"
# A caller's deadline reaches us rounded up by as much as this part of it, and some time after the call began.
_ROUNDED = 0.01
_ON_THE_WAY = 0.02


class Counting(grpc.aio.ServerInterceptor):
    """Counts the RPCs of one service, and those of no service; also those that the interceptors after it refuse."""

    def __init__(self, service: ServiceDescriptor, counters: Counters) -> None:
        self._methods = {f"/{service.full_name}/{method.name}": method.name for method in service.methods}
        self._prefix = f"/{service.full_name}/"
        self._counters = counters

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if path != UNKNOWN_PATH and not path.startswith(self._prefix):
            return handler
        method = self._methods.get(path, UNKNOWN_METHOD)
        if handler is None:
            self._counters.rpc_started(method)
            self._counters.rpc_finished(method, grpc.StatusCode.UNIMPLEMENTED.name, 0.0)
            return None
        return _replaced(handler, lambda behaviour: _counted(behaviour, method, self._counters))


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
        if handler is None:
            return None
        if not handler_call_details.method.startswith(self._prefix):
            return _readable(handler)
        return _replaced(handler, lambda old: _mapped(old, self._explained), forgiving)


def _readable(handler: Any) -> "Handler":
    """A handler of gRPC's own services, with our answer to bytes that are no message."""
    if handler.request_deserializer is None:
        return cast("Handler", handler)
    deserializer = forgiving(handler.request_deserializer)
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(
            _refusing_stream(handler.stream_stream), deserializer, handler.response_serializer
        )
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            _refusing_stream(handler.unary_stream), deserializer, handler.response_serializer
        )

    async def behaviour(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, Unread):
            await context.abort(*status_of(request.error))
        answer = handler.unary_unary(request, context)
        return await answer if inspect.isawaitable(answer) else answer

    return grpc.unary_unary_rpc_method_handler(behaviour, deserializer, handler.response_serializer)


def _refusing_stream(behaviour: Any) -> Any:
    async def requests(given: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async for request in given:
            if isinstance(request, Unread):
                await context.abort(*status_of(request.error))
            yield request

    async def refusing(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, Unread):
            await context.abort(*status_of(request.error))
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


def _replaced(handler: Handler, behaviour: Any, deserializer: Any = lambda same: same) -> Handler:
    """The same handler, with what the two functions make of its behaviour and its deserialiser."""
    # Every method of the servicer is a coroutine; streams write to the context.
    if handler.request_streaming:
        factory, old = grpc.stream_stream_rpc_method_handler, handler.stream_stream
    elif handler.response_streaming:
        factory, old = grpc.unary_stream_rpc_method_handler, handler.unary_stream
    else:
        factory, old = grpc.unary_unary_rpc_method_handler, handler.unary_unary
    return factory(behaviour(old), deserializer(handler.request_deserializer), handler.response_serializer)


def _counted(behaviour: Any, method: str, counters: Counters) -> Any:
    async def counted(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        started = time.monotonic()
        granted = context.time_remaining()
        code = grpc.StatusCode.OK
        counters.rpc_started(method)
        try:
            answer = await behaviour(request, context)
            code = _code_set(context, grpc.StatusCode.OK)
        except asyncio.CancelledError:
            code = _end_of_cancelled(granted, context.time_remaining())
            raise
        except BaseException:
            code = _code_set(context, grpc.StatusCode.UNKNOWN)
            raise
        else:
            return answer
        finally:
            counters.rpc_finished(method, code.name, time.monotonic() - started)

    return counted


def _code_set(context: grpc.aio.ServicerContext[Any, Any], otherwise: grpc.StatusCode) -> grpc.StatusCode:
    code = context.code()
    # As long as nobody has set one, it is the number 0.
    return code if isinstance(code, grpc.StatusCode) else otherwise


def _end_of_cancelled(granted: float | None, remaining: float | None) -> grpc.StatusCode:
    """What the caller saw: gRPC cancels also those whose deadline has passed, and tells us no difference."""
    if granted is None or remaining is None or remaining > granted * _ROUNDED + _ON_THE_WAY:
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.DEADLINE_EXCEEDED


def _mapped(behaviour: Any, explained: Callable[[Exception], Awaitable[Exception]]) -> Any:
    async def mapped(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, Unread):
            return _end(context, *status_of(request.error))
        # Each RPC has a task, and so a context, of its own.
        request_id.set(getattr(request, "CorrelationId", ""))
        try:
            return await behaviour(request, context)
        except grpc.aio.InternalError:
            # The caller has left while it was written to, and gRPC had no time to cancel us.
            raise asyncio.CancelledError from None
        except Exception as error:  # noqa: BLE001  # every exception gets a status
            return _end(context, *status_of(await explained(error)))

    return mapped


def _end(context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str) -> None:
    """End an RPC whose behaviour returns next; its answer, if it has one, is not sent.

    Not `context.abort`: gRPC keeps the exception that it raises with the call, and with it, in a cycle, the frames and
    the request. A refused one of 50 MiB would stay until Python's next full collection.
    """
    context.set_code(code)
    context.set_details(details)


async def _refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    _end(context, grpc.StatusCode.UNAUTHENTICATED, "missing or wrong token in the authorization metadata")
