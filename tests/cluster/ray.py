"""Ray out of the package index, in a folder of its own, and a cluster of it over several nodes."""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster.network import Node
from tests.models import MakeError, cache
from tests.process.orchestrator import eventually

# What it needs beside what vLLM has.
PACKAGES = ("ray==2.60.0", "msgpack>=1,<2")
PORT = 6379
SMALL = ("--num-cpus=1", "--object-store-memory=80000000", "--block", "--disable-usage-stats")
# Ray counts its users, over the network, paints its words, and a head that has no token makes one in the home folder.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_AUTH_MODE": "disabled",
}


def python_path() -> str:
    """The PYTHONPATH of a process that can import Ray. Installed into the folder of the models on first use."""
    return str(cache.folder("ray", 1, _install))


def _install(into: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv") or str(cache.REPOSITORY / ".uv/bin/uv")
    done = subprocess.run(
        [uv, "pip", "install", "--python", sys.executable, "--quiet", "--no-deps", "--target", into, *PACKAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise MakeError(f"{' '.join(PACKAGES)} can't be installed: {last}")


@contextlib.contextmanager
def cluster(nodes: Sequence[Node], folder: Path) -> Iterator[str]:
    """Ray on all these nodes, the first its head; gives the address that programs connect to."""
    address = f"{nodes[0].address}:{PORT}"
    environment = {**os.environ, **QUIET, "PYTHONPATH": python_path()}
    begins = (f"--port={PORT}", "--head", "--include-dashboard=false", f"--temp-dir={folder}")
    started = []
    try:
        for node in nodes:
            role = begins if node is nodes[0] else (f"--address={address}",)
            words = ("start", *role, f"--node-ip-address={node.address}", *SMALL)
            said = folder / f"{node.name}.log"
            with said.open("wb") as log:
                argv = node.argv(sys.executable, "-m", "ray.scripts.scripts", *words)
                started.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT))
            eventually(functools.partial(_says, said, "Ray runtime started"), 60, f"Ray runs in {node.name}")
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)


def nodes_alive(address: str, node: Node) -> int:
    """How many nodes the cluster says it has."""
    code = (
        f"import ray; ray.init(address={address!r}, logging_level='error'); print(sum(n['Alive'] for n in ray.nodes()))"
    )
    environment = {**os.environ, **QUIET, "PYTHONPATH": python_path()}
    done = subprocess.run(
        node.argv(sys.executable, "-c", code), env=environment, check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


def _says(log: Path, words: str) -> bool:
    return words in log.read_text(errors="replace")
