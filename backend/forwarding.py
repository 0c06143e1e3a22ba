"""RPCs that a frontend does not serve itself, passed on to the main process with all that belongs to them."""

from collections.abc import Callable
from typing import Any, cast

import grpc

from backend.interceptors import Continuation, Handler

# Their answers are the main process's alone.
ALWAYS = frozenset({"Health", "LoadModel", "Free", "GetMetrics", "Status"})
_HEALTH = "/grpc.health.v1.Health/"
# Made anew by the channel, or about the connection.
_OF_THE_CONNECTION = frozenset({"user-agent", "te", "content-type"})
_OF_GRPC = ("grpc-", ":")
_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Twice what the servers let through, which add a little to what they pass on.
    ("grpc.max_metadata_size", 32 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)

Context = grpc.aio.ServicerContext[Any, Any]


def connect(path: str) -> grpc.aio.Channel:
    """A channel to the main process, whose private socket has this path."""
    return grpc.aio.insecure_channel(f"unix:{path}", _OPTIONS)


class Forwarding(grpc.aio.ServerInterceptor):
    """Passes on the calls of `service` and of `grpc.health.v1` that this process can't answer, `is_open` or not.

    Whether it can is asked once the request is there, in one go with the servicer's own begin: a model that is attached
    then is there for it.
    """

    def __init__(self, service: str, is_open: Callable[[], bool], channel: grpc.aio.Channel) -> None:
        self._prefix = f"/{service}/"
        self._is_open = is_open
        self._channel = channel

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "Handler | None":
        """See `grpc.aio.ServerInterceptor`."""
        handler: Any = await continuation(handler_call_details)
        path = handler_call_details.method
        # What has several requests is refused in every state, with the same words everywhere.
        if handler is None or handler.request_streaming or not path.startswith((self._prefix, _HEALTH)):
            return cast("Handler | None", handler)
        always = path.startswith(_HEALTH) or path.removeprefix(self._prefix) in ALWAYS
        is_open = _never if always else self._is_open
        if handler.response_streaming:
            behaviour = _stream(path, handler, is_open, self._channel)
            return grpc.unary_stream_rpc_method_handler(behaviour, None, _serialized)
        behaviour = _unary(path, handler, is_open, self._channel)
        return grpc.unary_unary_rpc_method_handler(behaviour, None, _serialized)


def _unary(path: str, handler: Any, is_open: Callable[[], bool], channel: grpc.aio.Channel) -> Any:
    ask: Any = channel.unary_unary(path)

    async def behaviour(data: bytes, context: Context) -> Any:
        if is_open():
            return await handler.unary_unary(handler.request_deserializer(data), context)
        call = ask(data, timeout=context.time_remaining(), metadata=_metadata(context))
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            _fail(context, error)
        finally:
            call.cancel()

    return behaviour


def _stream(path: str, handler: Any, is_open: Callable[[], bool], channel: grpc.aio.Channel) -> Any:
    ask: Any = channel.unary_stream(path)

    async def behaviour(data: bytes, context: Context) -> None:
        if is_open():
            await handler.unary_stream(handler.request_deserializer(data), context)
            return
        call = ask(data, timeout=context.time_remaining(), metadata=_metadata(context))
        try:
            async for answer in call:
                await context.write(answer)
        except grpc.aio.AioRpcError as error:
            _fail(context, error)
        finally:
            call.cancel()

    return behaviour


def _fail(context: Context, error: grpc.aio.AioRpcError) -> None:
    """End as the main process did. Not `context.abort`, see `interceptors`."""
    context.set_trailing_metadata(tuple((key, value) for key, value in error.trailing_metadata() or ()))
    context.set_code(error.code())
    context.set_details(error.details() or "")


def _metadata(context: Context) -> tuple[tuple[str, Any], ...]:
    given: Any = context.invocation_metadata() or ()
    return tuple((key, value) for key, value in given if key not in _OF_THE_CONNECTION and not key.startswith(_OF_GRPC))


def _serialized(answer: Any) -> bytes:
    """Of an answer of the main process, which is bytes already, or of our own."""
    data: bytes = answer if isinstance(answer, bytes) else answer.SerializeToString()
    return data


def _never() -> bool:
    return False
