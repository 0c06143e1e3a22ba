"""The environment that vLLM is imported in."""

import os

import pytest
from vllm import envs

from common.vllm_env import DEFAULTS, prepare_environment


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    chosen = next(iter(DEFAULTS))
    monkeypatch.setenv(chosen, "")
    prepare_environment()
    assert {name: os.environ[name] for name in DEFAULTS} == DEFAULTS | {chosen: ""}


@pytest.mark.parametrize("name", DEFAULTS)
def test_vllm_knows_the_variable(name: str) -> None:
    assert name in envs.environment_variables


def test_vllm_was_imported_in_this_environment() -> None:
    # As in the server, where stdout stays empty.
    assert os.environ["VLLM_LOGGING_STREAM"] == envs.VLLM_LOGGING_STREAM
    assert envs.VLLM_NO_USAGE_STATS
