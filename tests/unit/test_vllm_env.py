"""The environment that vLLM is imported in."""

import os

import pytest
from vllm import envs

from common import cgroup
from common.vllm_env import DEFAULTS, prepare_environment


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    chosen = next(iter(DEFAULTS))
    monkeypatch.setenv(chosen, "")
    prepare_environment()
    assert {name: os.environ[name] for name in DEFAULTS} == DEFAULTS | {chosen: ""}


@pytest.mark.parametrize(
    ("quota", "given", "threads"),
    [(None, None, None), (1.5, None, "1"), (2.0, None, "2"), (8.0, None, None), (1.5, "3", "3")],
)
def test_as_many_threads_as_the_quota_has_time_for(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, given: str | None, threads: str | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cgroup, "processors", lambda: quota)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # which all tests have
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    prepare_environment()
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("name", DEFAULTS)
def test_vllm_knows_the_variable(name: str) -> None:
    assert name in envs.environment_variables


def test_vllm_was_imported_in_this_environment() -> None:
    # As in the server, where stdout stays empty.
    assert os.environ["VLLM_LOGGING_STREAM"] == envs.VLLM_LOGGING_STREAM
    assert envs.VLLM_NO_USAGE_STATS
