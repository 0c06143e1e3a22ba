"""Where vLLM's own command line has the head of a follower, however that is spelled."""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import pytest
from vllm.entrypoints.cli.serve import ServeSubcommand

from backend import follower
from backend.follower import heads
from common import network, vllm_cli


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[argparse.Namespace]:
    """What vLLM would have served: it gets as far as its command line."""
    read: list[argparse.Namespace] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(read.append))
    monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.version)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    return read


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--data-parallel-size 2", {}),
        ("-dp 2", {}),
        ("-dp=2", {}),
        ("-tp 2 -pp 2", {}),
        ("--data-parallel-address 10.0.0.1", {"data_parallel_address": "10.0.0.1"}),
        ("--data-parallel-address=head", {"data_parallel_address": "head"}),
        ("--data_parallel_address head", {"data_parallel_address": "head"}),
        ("--data-parallel_addr head", {"data_parallel_address": "head"}),
        ("-dpa fd00::1", {"data_parallel_address": "fd00::1"}),
        ("-dpa=head -dp 2 -dpl 1", {"data_parallel_address": "head"}),
        ("--config CONFIG -dp 2", {"data_parallel_address": "configured"}),
        ("--config CONFIG -dpa head", {"data_parallel_address": "head"}),
        ("--master-addr head --nnodes 2", {"master_addr": "head"}),
        ("--master_addr=head -n2 -r1 -tp 2", {"master_addr": "head"}),
        ("--master-a head -dp 2", {"master_addr": "head"}),
        ("-n 2", {"master_addr": "127.0.0.1"}),
        ("-n 2 -dpa head", {"data_parallel_address": "head"}),
        ("--master-addr a -dpa b -dpa c", {"data_parallel_address": "c", "master_addr": "a"}),
    ],
)
def test_heads(tmp_path: Path, read: list[argparse.Namespace], words: str, expected: dict[str, str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data-parallel-address: configured\n", encoding="ascii")
    found: list[dict[str, str]] = []
    argv = ["serve", "model", "--headless", *words.replace("CONFIG", str(config)).split()]
    vllm_cli.main(argv, lambda args: found.append(heads(args)))
    assert found == [expected]
    assert read[0].headless


@pytest.mark.parametrize("words", ["--master-addr", "-d head", "--data-parallel head", "-dp two"])
def test_what_vllm_refuses(read: list[argparse.Namespace], words: str) -> None:
    with pytest.raises(SystemExit):
        vllm_cli.main(["serve", "model", *words.split()], lambda _: pytest.fail("it is refused"))
    assert not read


def test_the_route_is_chosen_before_vllm_begins(
    read: list[argparse.Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "ipv6_address", {"six": "fd00::1"}.get)
    used: list[str] = []
    monkeypatch.setattr(network, "use_route_to", used.append)
    vllm_cli.main(["serve", "model", "-dp", "2", "-dpa", "six"], follower._use_route_to_head)
    assert used == ["six"]
    assert read[0].data_parallel_address == "fd00::1"


def test_a_head_that_no_route_leads_to(caplog: pytest.LogCaptureFixture) -> None:
    args = argparse.Namespace(data_parallel_address="a..b", master_addr="127.0.0.1", nnodes=1)
    follower._use_route_to_head(args)
    assert "vLLM chooses the card" in caplog.text
    assert args.data_parallel_address == "a..b"
