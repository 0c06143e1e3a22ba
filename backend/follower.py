"""`run.sh serve MODEL --headless ...`: a follower's ranks, started by vLLM's own command line in this very process.

So the process id, the signals, the output and the exit status are vLLM's; there is no gRPC. Ours is what surrounds it:
the environment that the head's engine has too, and that no engine process outlives this one, whatever ends it.
"""

import importlib
from collections.abc import Sequence

from common import orphan_watch
from common.vllm_env import prepare_environment


def main(argv: Sequence[str]) -> None:
    """Run `vllm ARGV`, which begins with `serve`; without --headless that is vLLM's HTTP server."""
    prepare_environment()
    # What vLLM spawns runs `backend/entry.py` first, as the server's own engine does.
    orphan_watch.announce()
    importlib.import_module("common.vllm_cli").main(argv)
