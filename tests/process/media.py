"""Requests with media, and what comes back."""

import base64
from typing import Any

import grpc
import pytest

from common.pb import backend_pb2 as pb
from tests.process.orchestrator import Backend

INVALID = grpc.StatusCode.INVALID_ARGUMENT
SECRET = "c2VjcmV0" * 40


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chat(text: str = "What is this?", **fields: Any) -> pb.PredictOptions:
    """A request with one message of the user, unless it says otherwise."""
    return options(**{"UseTokenizerTemplate": True, "Messages": [pb.Message(role="user", content=text)]} | fields)


def raw(prompt: str, **fields: Any) -> pb.PredictOptions:
    return options(Prompt=prompt, **fields)


def options(**fields: Any) -> pb.PredictOptions:
    return pb.PredictOptions(Tokens=12, IgnoreEOS=True, **fields)


def answer(backend: Backend, request: pb.PredictOptions) -> pb.Reply:
    reply: pb.Reply = backend.call("Predict", request)
    assert reply.tokens == 12
    return reply


def said(backend: Backend, request: pb.PredictOptions) -> str:
    return answer(backend, request).message.decode()


def prompt_tokens(backend: Backend, request: pb.PredictOptions) -> int:
    return int(answer(backend, request).prompt_tokens)


def refused(backend: Backend, request: pb.PredictOptions) -> str:
    """The sentence of an INVALID_ARGUMENT, which holds nothing of a payload."""
    with pytest.raises(grpc.RpcError) as raised:
        backend.call("Predict", request)
    details = str(raised.value.details())
    assert raised.value.code() == INVALID, details
    assert SECRET[:16] not in details
    assert "secret" not in details
    return details
