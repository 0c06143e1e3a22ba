"""`run.sh serve MODEL --headless ...`: a follower's ranks, started by vLLM's own command line in this very process.

So the process id, the signals, the output and the exit status are vLLM's; there is no gRPC. Ours is what surrounds it:
the environment that the head's engine has too, the network card that leads to the head, and that no engine process
outlives this one, whatever ends it.
"""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from backend.logs import TEXT, TIME, TextFormatter
from common import engine_sockets, network, orphan_watch
from common.errors import InvalidRequest, LoadFailed
from common.vllm_env import prepare_environment

logger = logging.getLogger(__name__)

# vLLM's default of --master-addr.
_OWN = "127.0.0.1"


def main(argv: Sequence[str]) -> None:
    """Run `vllm ARGV`, which begins with `serve`; without --headless that is vLLM's HTTP server."""
    _log_our_own()
    prepare_environment()
    # Of `run.sh worker`, if it was that which started this one.
    orphan_watch.watch_server()
    # What vLLM spawns runs `backend/entry.py` first, as the server's own engine does.
    orphan_watch.announce()
    with contextlib.suppress(LoadFailed):  # vLLM will say what is wrong with the temporary folder
        os.environ[engine_sockets.VARIABLE] = engine_sockets.make_folder()
    importlib.import_module("common.vllm_cli").main(argv, _use_route_to_head)


def heads(args: argparse.Namespace) -> dict[str, str]:
    """Where vLLM will look for the head, an address or a host, by the names of the flags that it has read."""
    found = {"data_parallel_address": args.data_parallel_address, "master_addr": args.master_addr}
    if args.master_addr == _OWN and (args.nnodes == 1 or args.data_parallel_address):
        del found["master_addr"]  # nobody has named it
    return {name: head for name, head in found.items() if head}


def _use_route_to_head(args: argparse.Namespace) -> None:
    for name, head in heads(args).items():
        try:
            network.use_route_to(head)
        except InvalidRequest as error:
            logger.warning("network: %s; vLLM chooses the card", error)
        if address := network.ipv6_address(head):
            # vLLM's sockets take names for IPv4.
            setattr(args, name, address)


def _log_our_own() -> None:
    """To stderr, as the server does; everybody else's loggers are vLLM's business here."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter(TEXT, TIME))
    for name in ("backend", "common"):
        ours = logging.getLogger(name)
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
