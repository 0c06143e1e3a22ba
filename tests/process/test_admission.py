"""More than is admitted: refused at once, with a sentence, and nobody else notices."""

import functools
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import Backend, eventually
from tests.process.test_lifecycle import plain
from tests.process.wire import ENDLESS, PARSERS, chat, model_options, predict_options

# One request runs, three may wait, and so may less than two long prompts.
LIMITS = {"BACKEND_MAX_RUNNING_REQUESTS": "1", "BACKEND_MAX_WAITING_REQUESTS": "3", "BACKEND_MAX_WAITING_TOKENS": "300"}
LONG = "fox " * 200
AT_ONCE = 1.0


@pytest.fixture(scope="module")
def limited(scripted: Path) -> Iterator[Backend]:
    with Backend(env=LIMITS) as backend:
        backend.wait_for_health()
        assert backend.load(model_options(scripted, *PARSERS)).success
        yield backend


def refusal(backend: Backend, rpc: str) -> str:
    """What the caller is told, who must not have waited for it."""
    started = time.monotonic()
    ask = backend.stream if rpc == "PredictStream" else functools.partial(backend.call, rpc)
    with pytest.raises(grpc.RpcError) as raised:
        ask(predict_options(line("plain")))
    assert time.monotonic() - started < AT_ONCE
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    return str(raised.value.details())


@pytest.mark.parametrize("rpc", ["Predict", "PredictStream"])
def test_limits(limited: Backend, rpc: str) -> None:
    with limited.connection() as stub:
        running = stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60)
        next(running)
        waiting = [stub.PredictStream(predict_options(line("plain")), timeout=60) for _ in range(3)]
        time.sleep(0.3)  # they have arrived
        assert "4 requests run or wait" in refusal(limited, rpc)
        for call in waiting:
            call.cancel()
        long = stub.PredictStream(chat(LONG, Tokens=1), timeout=60)
        time.sleep(0.3)
        details = refusal(limited, rpc)
        assert "prompt tokens wait for their prefill, and 300 are admitted" in details
        # Tokenizing takes nothing from the engine.
        assert limited.call("TokenizeString", predict_options(line("plain"))).length > 0
        next(running)
        running.cancel()
        assert list(long)[-1].tokens == 1

    def admitted() -> bool:
        return plain(limited) == line("plain").content

    assert eventually(admitted, 5, "room again")
    assert limited.status().state == pb.StatusResponse.READY
