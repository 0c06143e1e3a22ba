"""What a head says of its ranks, and what answers through it must be."""

import json
import shlex
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import Backend, eventually
from tests.process.wire import PARSERS, content, model_options, predict_options

LINES = ("plain", "reasoning", "tool", "unicode")
PATIENCE = 150.0
_WAITING = "waiting (seconds) for "


def options(model: Path, *own: str, **engine_args: Any) -> pb.ModelOptions:
    """LoadModel's request for the scripted model with a topology."""
    return model_options(model, *PARSERS, *own, MaxModelLen=1024, EngineArgs=json.dumps(engine_args))


def in_background(backend: Backend, request: pb.ModelOptions) -> "Future[pb.Result]":
    """LoadModel on its way."""
    pool = ThreadPoolExecutor(1)
    load = pool.submit(backend.load, request)
    pool.shutdown(wait=False)
    return load


def waits(backend: Backend, load: "Future[pb.Result]", ranks: int = 1) -> list[list[str]]:
    """The words of the lines that Status names for the ranks that a load waits for, once it does for so many."""

    def told() -> list[str]:
        if load.done():
            raise AssertionError(f"it waits for nobody: {load.result()}")
        named = [key for key in backend.status().memory.breakdown if key.startswith(_WAITING)]
        return named if len(named) == ranks else []

    return [words_of(each) for each in eventually(told, PATIENCE, "Status names the missing ranks")]


def words_of(text: str) -> list[str]:
    """The words behind `run.sh` in the line that a text ends with."""
    program, *words = shlex.split(text[text.index("run.sh serve") :])
    assert program == "run.sh"
    return words


def answers(backend: Backend, rank: int | None = None) -> dict[str, str]:
    """What the lines of the script are answered, by the rank that is asked for."""
    found = {}
    for name in LINES:
        request = predict_options(line(name))
        if rank is not None:
            request.Metadata["data_parallel_rank"] = str(rank)
        found[name] = content(backend.stream(request)).strip()
    return found


def expected() -> dict[str, str]:
    """What one node answers: the script, to the letter."""
    return {name: line(name).answer.partition("<tool_call>")[0].strip() for name in LINES}
