"""Our own log lines: one record, one line, as text or as JSON."""

import datetime
import json
import logging
import re
import sys

from common.request_context import request_id

TEXT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"
TIME = "%m-%d %H:%M:%S"
_MOST_ID_CHARACTERS = 200
# Whatever ends a line somewhere, and what a terminal would obey.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def configure_logging(level: str, log_format: str) -> None:
    """Send records of `level` and above to stderr. vLLM's loggers have handlers of their own and are left alone."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(TEXT, TIME))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("grpc._cython.cygrpc").addFilter(hide_header_value)


def hide_header_value(record: logging.LogRecord) -> bool:
    """A filter: gRPC logs a header that is no UTF-8 with its value, which may be all but a byte of the token."""
    if record.levelno >= logging.ERROR and str(record.msg).startswith("Invalid encoding on"):
        record.msg, record.args, record.exc_info = "a header of a request is not UTF-8", (), None
    return True


class TextFormatter(logging.Formatter):
    """Level, time, logger, message, and a traceback behind it; line breaks and control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        text = super().format(record)
        if identifier := _request_id(record):
            text += f" (request {identifier})"
        return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class JsonFormatter(logging.Formatter):
    """An object with time (RFC 3339, UTC), level, logger, message; request_id and exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identifier := _request_id(record):
            line["request_id"] = identifier
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _request_id(record: logging.LogRecord) -> str:
    """Of the record, where `extra` gave it one, or of the task that logs."""
    return str(getattr(record, "request_id", "") or request_id.get())[:_MOST_ID_CHARACTERS]
