"""What the present task's request brought along besides its message."""

import contextvars
from collections.abc import Mapping

# For log lines; empty where no request is served, or where its caller gave it no id.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
# `traceparent` and `tracestate` for the engine's spans, see `tracing.trace_headers`; None where they are of no use.
trace_headers: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar("trace_headers", default=None)
