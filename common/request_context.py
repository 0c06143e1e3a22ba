"""Which request the present task works on, for log lines."""

import contextvars

# Empty where no request is served, or where its caller gave it no id.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
