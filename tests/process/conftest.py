"""Servers for the tests of a module to share: one engine at a time, for they share the machine too."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import ensure
from tests.process.orchestrator import Backend, Heart, Watch
from tests.process.wire import PARSERS, model_options


@pytest.fixture(scope="session")
def scripted() -> Path:
    """The folder of the scripted model."""
    return ensure("scripted")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2."""
    return ensure("smollm2")


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """A server without a model."""
    with Backend() as backend:
        backend.wait_for_health()
        yield backend


@pytest.fixture(scope="module")
def heart(backend: Backend, request: pytest.FixtureRequest) -> Iterator[Heart]:
    """Health of `backend`, called all the time, its load included."""
    with Heart(backend, request.module.__name__) as heart:
        yield heart


@pytest.fixture(scope="module")
def first_load(backend: Backend, heart: Heart, scripted: Path) -> Watch:
    """What Status said while `backend` loaded the scripted model."""
    started = time.monotonic()
    with Watch(backend) as watch:
        result = backend.load(model_options(scripted, *PARSERS))
    assert result.success, result.message
    print(f"loaded in {time.monotonic() - started:.1f} s")
    return watch


@pytest.fixture(scope="module")
def served(backend: Backend, first_load: Watch) -> Backend:
    """`backend` with the scripted model in it."""
    return backend
