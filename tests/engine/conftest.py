"""A real vLLM engine with the scripted model, one at a time, shared by all tests that load it the same way."""

import inspect
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.vllm_env import prepare_environment

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
prepare_environment()

from common.engine_log import StageClock  # noqa: E402  # after the environment is prepared
from common.model import Model, plan_load  # noqa: E402
from common.pb import backend_pb2 as pb  # noqa: E402
from tests.engine.forked import fork_engines  # noqa: E402
from tests.models import ensure  # noqa: E402

MAX_MODEL_LEN = 1024
STOP_SECONDS = 15.0
# The fixtures of the two engines that many modules share, in the order in which they run.
SHARED = ("thinking_model", "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a shared engine follow each other, whatever module they are of; those that end it come last."""
    room = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    for index, item in zip(room, sorted((items[index] for index in room), key=_turn), strict=True):
        items[index] = item


def _turn(item: pytest.Item) -> tuple[int, bool]:
    assert isinstance(item, pytest.Function)
    for turn, name in enumerate(SHARED):
        if name in item.fixturenames:
            return turn, "engines" in inspect.signature(item.function).parameters
    return len(SHARED), False


class Engines:
    """The one engine that runs, and how to get another."""

    def __init__(self) -> None:
        self._key: bytes | None = None
        self._model: Model | None = None

    async def get(self, *options: str, **fields: Any) -> Model:
        """The scripted model loaded with these `ModelOptions.Options` and other fields; another one goes first."""
        usual: dict[str, Any] = {"Model": str(ensure("scripted")), "DType": "float32", "MaxModelLen": MAX_MODEL_LEN}
        wire = pb.ModelOptions(**usual | fields, Options=options)
        key = wire.SerializeToString(deterministic=True)
        if self._model is None or self._key != key:
            await self.close()
            self._model = await Model.load(plan_load(wire), StageClock(lambda _stage, _seconds: None))
            self._key = key
        return self._model

    async def close(self) -> None:
        """End the engine that runs, if any."""
        model, self._model = self._model, None
        if model is not None:
            await model.close(STOP_SECONDS)


@pytest.fixture(scope="package")
async def engines() -> AsyncIterator[Engines]:
    """All engines of this room, one after the other; what vLLM puts into the environment goes with them."""
    environment = dict(os.environ)
    engines = Engines()
    with pytest.MonkeyPatch.context() as patch:
        fork_engines(patch)
        yield engines
        await engines.close()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
async def model(engines: Engines) -> Model:
    """The scripted model with a parser for its tool calls."""
    return await engines.get("tool_parser:hermes", "reasoning_parser:none")


@pytest.fixture
async def thinking_model(engines: Engines) -> Model:
    """The scripted model with the parsers that it shows it needs: for its thoughts and its tool calls."""
    return await engines.get()
