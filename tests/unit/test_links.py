"""Connections whose other end is gone, between two network namespaces, and which are watched at all."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from common import links
from tests.cluster.network import Network, available

KEEPALIVE = (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
USER_TIMEOUT = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
SECONDS = 2.0

# Connects, says so, and stays; in the second mode with more than its peer will take.
CLIENT = """
import os, socket, sys, time
from common import links
links.begin()
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
connection.setblocking(False)
if sys.argv[3] == "full":
    try:
        while True:
            connection.send(bytes(1 << 16))
    except BlockingIOError:
        pass
print("connected", flush=True)
connection.setblocking(True)
try:
    while connection.recv(1):
        pass
    print("end", flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize(
    ("text", "seconds"), [("", 3.0), ("4", 4.0), ("1.5", 1.5), ("0", 3.0), ("soon", 3.0), ("nan", 3.0), ("9999", 3.0)]
)
def test_the_variable(text: str, seconds: float) -> None:
    assert links.timeout({links.VARIABLE: text}) == seconds
    assert links.timeout({}) == 3.0


def test_nothing_begins_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(links.VARIABLE, raising=False)
    before = threading.active_count()
    links.begin()
    assert threading.active_count() == before


def test_listeners_hand_their_timeout_on() -> None:
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.enter_context(links.guarded_listeners(SECONDS))
        ours = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(ours.getsockname()))
        early = stack.enter_context(ours.accept()[0])
        deadline = time.monotonic() + 5
        while not ours.getsockopt(*KEEPALIVE) or not early.getsockopt(*KEEPALIVE):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stack.enter_context(socket.create_connection(ours.getsockname()))
        for accepted in (early, stack.enter_context(ours.accept()[0])):
            assert accepted.getsockopt(*KEEPALIVE)
            assert accepted.getsockopt(*USER_TIMEOUT) == 2000
        for untouched in (other, client):
            assert not untouched.getsockopt(*KEEPALIVE)
            assert untouched.getsockopt(*USER_TIMEOUT) == 0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if not available():
        pytest.skip("network namespaces need root and iproute2")
    with Network(1) as network:
        yield network


@pytest.mark.parametrize("mode", ["idle", "full"])
@pytest.mark.parametrize("fate", ["cut", "slow"])
def test_another_machine(network: Network, mode: str, fate: str) -> None:
    """Cut off, it is noticed in time; one that only does not read is let alone."""
    (node,) = network.nodes
    with socket.create_server((network.gateway, 0)) as server:
        argv = node.argv(sys.executable, "-c", CLIENT, network.gateway, str(server.getsockname()[1]), mode)
        environment = os.environ | {links.VARIABLE: str(SECONDS), "PYTHONPATH": os.getcwd()}
        client = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            with server.accept()[0]:
                assert client.stdout is not None
                assert client.stdout.readline() == "connected\n"
                if fate == "cut":
                    node.cut()
                    client.wait(SECONDS + 4)
                else:
                    with pytest.raises(subprocess.TimeoutExpired):
                        client.wait(SECONDS * 3)
        finally:
            client.kill()
            client.wait()
            if client.stdout is not None:
                client.stdout.close()
            if fate == "cut":
                node.mend()
