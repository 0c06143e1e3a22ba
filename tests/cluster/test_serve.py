"""`make test-cluster`: run.sh serve is vLLM's command line: its server, its signals, its exit status."""

import http.client
import json
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import follower, heavy, needs_namespaces
from tests.cluster.lines import PATIENCE
from tests.cluster.network import Node
from tests.models.script import line
from tests.process.orchestrator import eventually, free_port

pytestmark = [needs_namespaces, heavy, pytest.mark.timeout(600)]

END_SECONDS = 30.0
GONE_SECONDS = 5.0
SMALL = ("--max-model-len", "1024", "--dtype", "float32", "--enforce-eager")


def test_a_flag_that_vllm_lacks(nodes: list[Node], scripted: Path) -> None:
    with follower(nodes[0], "serve", str(scripted), "--headless", "--no-such-flag") as serve:
        assert serve.wait_for_exit(PATIENCE) == 2
        assert serve.last_stderr_line == "vllm: error: unrecognized arguments: --no-such-flag"


def test_without_headless_it_is_vllms_server(nodes: list[Node], scripted: Path) -> None:
    port = free_port()
    words = ("serve", str(scripted), "--host", nodes[0].address, "--port", str(port), *SMALL)
    with follower(nodes[0], *words) as serve:
        eventually(lambda: "Application startup complete" in serve.stderr or serve.exit_status, PATIENCE, "it serves")
        assert serve.exit_status is None
        asked = line("plain")
        body = {"model": str(scripted), "messages": asked.messages, "temperature": 0}
        connection = http.client.HTTPConnection(nodes[0].address, port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.load(connection.getresponse())
        connection.close()
        assert answer["choices"][0]["message"]["content"].strip() == asked.answer
        # An engine is never left behind, and the signal is vLLM's: it drains, and ends with 0.
        assert serve.engine_cores()
        started = time.monotonic()
        serve.signal_leader(signal.SIGTERM)
        assert serve.wait_for_exit(END_SECONDS) == 0
        print(f"\nSIGTERM: exit status 0 after {time.monotonic() - started:.1f} s")
        eventually(lambda: not serve.processes(), GONE_SECONDS, "all processes are gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_follower_that_waits_for_its_head_is_stopped(
    nodes: list[Node], scripted: Path, number: signal.Signals
) -> None:
    words = ("serve", str(scripted), "--headless", "--data-parallel-size", "2", "--data-parallel-size-local", "1")
    head = ("--data-parallel-start-rank", "1", "--data-parallel-address", nodes[1].address)
    with follower(nodes[0], *words, *head, *SMALL) as serve:
        eventually(serve.engine_cores, PATIENCE, "its engine has started")
        serve.signal_leader(number)
        assert serve.wait_for_exit(END_SECONDS) == 0
        eventually(lambda: not serve.processes(), GONE_SECONDS, "all processes are gone")
