"""Engines' processes as forks of pytest's: each would import vLLM for itself otherwise, for most of a load's time.

So does vLLM itself where there is a GPU. Ours spawns them, see `tests/process`, where gRPC's threads forbid a fork.
"""

import logging
import os
import sys
import warnings
from multiprocessing.context import ForkContext, ForkProcess

import pytest
from vllm.v1.engine import utils


class _Process(ForkProcess):
    def run(self) -> None:
        """Without what pytest has made of warnings and of stderr, which descriptor 2 alone is again."""
        warnings.resetwarnings()
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        for handler in logging.getLogger("vllm").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
        super().run()


class _Context(ForkContext):
    Process = _Process


def fork_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have vLLM fork the processes of the engines that it starts from now on."""
    monkeypatch.setattr(utils, "get_mp_context", _Context)
