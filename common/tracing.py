"""OpenTelemetry: the caller's trace context on its way to vLLM, and what vLLM's tracer leaves behind in this process.

vLLM makes one span per request and sends it to the engine argument `otlp_traces_endpoint`.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator

from common.errors import InvalidRequest

logger = logging.getLogger(__name__)

# https://www.w3.org/TR/trace-context/#traceparent-header: a later version may add fields, version ff is none.
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
# The longest that every vendor must pass on.
_MOST_TRACESTATE = 512
# vLLM tells its child processes by this variable where their spans go.
_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
# What spans that are not sent yet get once the engine ends; Free has a deadline.
_FLUSH_SECONDS = 1.0

# OpenTelemetry has one tracer provider per process, and the first stays.
_endpoints: set[str] = set()


def trace_headers(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str] | None:
    """The trace context in a call's metadata; None without one, or with one that W3C's rule says to ignore."""
    parents = [value for key, value in metadata if key == "traceparent"]
    if len(parents) != 1 or not isinstance(parents[0], str):
        return None
    match = _TRACEPARENT.fullmatch(parents[0])
    if match is None or (match[1] == "00" and match[2]):
        return None
    headers = {"traceparent": parents[0]}
    state = ",".join(value for key, value in metadata if key == "tracestate" and isinstance(value, str))
    if state and state.isascii() and len(state) <= _MOST_TRACESTATE:
        headers["tracestate"] = state
    return headers


@contextlib.contextmanager
def sending_to(endpoint: str | None) -> Iterator[None]:
    """A context to start an engine in whose spans go to `endpoint`; the engine after it finds no trace of that.

    Raises:
        InvalidRequest: the spans of this process go elsewhere already.

    """
    if endpoint is None:
        yield
        return
    if _endpoints - {endpoint}:
        raise InvalidRequest(
            "otlp_traces_endpoint",
            f"this process sends its traces to {min(_endpoints)} for good; use the same, or a new process",
        )
    _endpoints.add(endpoint)
    before = os.environ.get(_ENDPOINT_VARIABLE)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_ENDPOINT_VARIABLE, None)
        else:
            os.environ[_ENDPOINT_VARIABLE] = before


async def flush() -> None:
    """Send what is left; spans go out every 5 s otherwise, and the process may end before."""
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    force_flush = getattr(provider, "force_flush", None)  # the SDK's providers have it
    if force_flush is None:
        return
    # It keeps no time limit itself. The thread that is left ends with the exporter's own, or with the process.
    try:
        async with asyncio.timeout(_FLUSH_SECONDS):
            await asyncio.to_thread(force_flush)
    except TimeoutError:
        logger.warning("the last traces were not sent within %.0f s", _FLUSH_SECONDS)
