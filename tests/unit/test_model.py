"""The front of the package, as far as it goes without an engine."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from common import model as room
from common.errors import InvalidRequest
from common.model import LoadPlan, Model
from common.pb import backend_pb2 as pb


@pytest.mark.parametrize(
    ("options", "in_a_thread"),
    [
        (pb.PredictOptions(Prompt="x"), False),
        (pb.PredictOptions(Prompt="x", Metadata={"enable_thinking": "true"}), False),
        (pb.PredictOptions(Prompt="x", Grammar='root ::= "a"'), True),
        (pb.PredictOptions(Prompt="x", Metadata={"json_schema": "{}"}), True),
        (pb.PredictOptions(Prompt="x", Metadata={"response_format": '{"type": "text"}'}), True),
    ],
    ids=lambda value: str(value).replace("\n", " "),
)
async def test_grammars_are_read_outside_the_event_loop(
    options: pb.PredictOptions, in_a_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[int] = []

    def read(*_args: Any, **_kwargs: Any) -> Any:
        readers.append(threading.get_ident())
        raise InvalidRequest("Prompt", "enough")

    monkeypatch.setattr(room, "generation_request", read)
    model = Model.__new__(Model)
    model.plan = LoadPlan({})
    model._generator = SimpleNamespace(has_tool_parser=False, max_logprobs=20)  # type: ignore[assignment]
    model._engine = SimpleNamespace(ranks=1)  # type: ignore[assignment]
    with pytest.raises(InvalidRequest):
        await model.predict(options)
    with pytest.raises(InvalidRequest):
        await anext(model.predict_stream(options))
    assert [reader != threading.get_ident() for reader in readers] == [in_a_thread] * 2
