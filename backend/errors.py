"""The one table from exceptions to gRPC status codes."""

import logging
import traceback
import uuid

import grpc

from common import errors

logger = logging.getLogger(__name__)

# Peers refuse more than 8 KiB of headers in all, and a byte may take three when encoded.
MOST_BYTES = 2000

STATUS_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unsupported, grpc.StatusCode.UNIMPLEMENTED),
    # Only for "no model": the orchestrator drops the replica and loads again.
    (errors.ModelNotLoaded, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.IdentityMismatch, grpc.StatusCode.NOT_FOUND),
    # Never UNAVAILABLE: the orchestrator evicts the model on that.
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (MemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.EngineGone, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """Status and text for the caller, logged at DEBUG; a bug of ours gets an id that the log has at ERROR too."""
    for kind, code in STATUS_CODES:
        if isinstance(error, kind):
            text = _clipped(str(error) or type(error).__name__)
            logger.debug("%s: %s", code.name, text)
            return code, text
    incident = uuid.uuid4().hex[:12]
    logger.error("internal error %s: %s", incident, traced(error))
    logger.debug("internal error %s: %s", incident, error)
    return grpc.StatusCode.INTERNAL, f"internal error {incident}; the server's log has the details"


def traced(error: Exception) -> str:
    """Which exception, and where it comes from, for the log; never its own text, which may hold a prompt."""
    return "".join((type(error).__name__, "\n", *traceback.format_tb(error.__traceback__)))


def _clipped(text: str) -> str:
    """`text` as it fits into a header, whatever a caller's value put into it."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= MOST_BYTES else data[:MOST_BYTES].decode(errors="ignore") + "…"
