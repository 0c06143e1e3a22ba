"""No engine starts in this room; vLLM is imported at most once, in the environment that the server gives it."""

import os
import sys
import types
from collections.abc import Iterator

import pytest
from hypothesis import settings

from backend import slow_import
from common.vllm_env import prepare_environment

prepare_environment()

# The same examples at each run, so that a failure is the change's; HYPOTHESIS_PROFILE=search looks further.
settings.register_profile("unit", deadline=None, derandomize=True, database=None, max_examples=100)
settings.register_profile("search", deadline=None, database=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))


@pytest.fixture(autouse=True)
def _no_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server of this room has a process for its first engine, which imports vLLM."""
    monkeypatch.setattr(slow_import, "spare", types.SimpleNamespace(start=lambda: None))


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Gives back the environment: vLLM writes into it whenever it makes a configuration, LD_PRELOAD above all."""
    before = dict(os.environ)
    if vllm_envs := sys.modules.get("vllm.envs"):
        vllm_envs.disable_envs_cache()  # an engine of another room may be up
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)
