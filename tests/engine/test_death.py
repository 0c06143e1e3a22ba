"""An engine whose output nobody can take any more."""

import asyncio
from typing import Any

import pytest

from common.model import Model
from tests.engine.conftest import Engines
from tests.engine.wire import options, stream
from tests.models.script import line

ANSWER = "text of an answer"


async def test_output_handler_that_fails(
    engines: Engines, model: Model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is put into the engine's own client: no request is known to bring it about."""
    llm = model._engine.llm

    def process_outputs(*_args: Any, **_kwargs: Any) -> None:
        raise OverflowError(ANSWER)

    assert not model.dead
    monkeypatch.setattr(llm.output_processor, "process_outputs", process_outputs)
    streams = [asyncio.create_task(stream(model, options(line("long")))) for _ in range(3)]
    done, pending = await asyncio.wait(streams, timeout=10)
    assert not pending
    assert all(isinstance(task.exception(), Exception) for task in done)
    assert model.dead
    cause = await model.cause_of_death()
    assert cause.startswith("OverflowError in the engine's output handler (test_death.py:")
    assert ANSWER not in cause + caplog.text
    assert cause in caplog.text
    await engines.close()
