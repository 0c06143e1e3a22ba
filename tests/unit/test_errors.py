"""Every exception a caller can meet has its status; what is ours to mend has an id."""

import logging

import grpc
import pytest

from backend.errors import STATUS_CODES, status_of
from common import errors
from common.errors import BackendError, InvalidRequest, LoadFailed

# What gRPC surely carries: the header block of a status is limited to 8 KiB, and bytes outside ASCII count thrice.
MOST_BYTES = 2500

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.InvalidRequest("TopK", "-2 is not allowed"), CODE.INVALID_ARGUMENT, "TopK: -2 is not allowed"),
        (errors.Unsupported("no images"), CODE.UNIMPLEMENTED, "no images"),
        (errors.ModelNotLoaded(), CODE.FAILED_PRECONDITION, "model not loaded"),
        (errors.IdentityMismatch("a", "b"), CODE.NOT_FOUND, "model identity mismatch"),
        (errors.Overloaded("full"), CODE.RESOURCE_EXHAUSTED, "full"),
        (MemoryError(), CODE.RESOURCE_EXHAUSTED, "MemoryError"),
        (errors.EngineGone("gone"), CODE.UNAVAILABLE, "gone"),
        # Of some look-up of ours: a caller's deadline ends the RPC by itself.
        (TimeoutError("secret"), CODE.INTERNAL, "internal error"),
        (RuntimeError("secret"), CODE.INTERNAL, "internal error"),
        (ValueError("secret"), CODE.INTERNAL, "internal error"),
        (KeyError("secret"), CODE.INTERNAL, "internal error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_status(error: Exception, code: grpc.StatusCode, text: str) -> None:
    found, message = status_of(error)
    assert found is code
    assert text in message
    assert "secret" not in message


def test_every_exception_of_ours_has_a_status() -> None:
    # LoadModel answers a failed load in its reply.
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BackendError)}
    kinds -= {BackendError, LoadFailed, errors.LoadCancelled}
    assert kinds <= {kind for kind, _ in STATUS_CODES}


def test_no_code_but_the_one_for_it_makes_the_orchestrator_drop_the_model() -> None:
    for code, kinds in {
        CODE.FAILED_PRECONDITION: [errors.ModelNotLoaded],
        CODE.NOT_FOUND: [errors.IdentityMismatch],
        CODE.UNAVAILABLE: [errors.EngineGone],
    }.items():
        assert [kind for kind, found in STATUS_CODES if found is code] == kinds


def test_a_bug_of_ours_has_an_id_that_the_log_has_too(caplog: pytest.LogCaptureFixture) -> None:
    prompt = "sec" + "ret"  # the log has lines of source

    def guilty() -> None:
        raise RuntimeError(f"the prompt was: {prompt}")

    with pytest.raises(RuntimeError) as caught:
        guilty()
    with caplog.at_level(logging.INFO):
        _, message = status_of(caught.value)
        _, other = status_of(caught.value)
    incident = message.split()[2].rstrip(";")
    assert len(incident) == 12
    assert incident not in other
    assert incident in caplog.text
    assert "RuntimeError" in caplog.text
    assert "in guilty" in caplog.text
    assert prompt not in caplog.text


@pytest.mark.parametrize("text", ["x" * 1_000_000, "東" * 100_000], ids=["long", "long and wide"])
def test_a_status_fits_into_a_header(text: str) -> None:
    # Beyond the limit the client sees RESOURCE_EXHAUSTED and no text at all.
    code, message = status_of(InvalidRequest("Messages[0].role", f"{text!r} is unknown"))
    assert code is CODE.INVALID_ARGUMENT
    assert message.startswith("Messages[0].role: ")
    assert len(message.encode()) <= MOST_BYTES


def test_a_status_is_text() -> None:
    # grpc.aio raises for others, and the caller would never hear anything.
    _, message = status_of(InvalidRequest("ToolChoice", "no function \udfff"))
    assert message.startswith("ToolChoice: no function ")
    message.encode()
