"""The metrics port: its addresses, and what a scrape finds there."""

import asyncio
import contextlib
import dataclasses
import http.client
import logging
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import REGISTRY, Gauge, make_wsgi_app
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from backend import metrics_port
from backend.counters import Counters, Stream
from backend.flag_values import SettingsError
from backend.lifecycle import Lifecycle, State
from backend.metrics import MetricsServer, registry

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclasses.dataclass
class FakeLifecycle:
    state: State = State.NO_MODEL
    loaded_at: float | None = None
    scheduled_at: dict[int, float] = dataclasses.field(default_factory=dict)


class Port:
    """A metrics server in this process."""

    def __init__(self, listening: socket.socket) -> None:
        self.counters = Counters()
        self.lifecycle = FakeLifecycle()
        self.port = listening.getsockname()[1]
        self.server = MetricsServer(listening, make_wsgi_app(registry(self.counters, self.lifecycle)))

    def get(self, path: str = "/metrics", accept: str = "text/plain") -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310  # http, of this machine
            assert response.status == 200
            return str(response.read().decode())

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in parse(self.get())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port(metrics_port.bind("127.0.0.1:0"))
    thread = threading.Thread(target=port.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield port
    port.server.shutdown()
    port.server.server_close()
    thread.join()


def test_rpcs(port: Port) -> None:
    assert port.value("backend_rpcs_started_total", method="Predict") is None
    for _ in range(3):
        port.counters.rpc_started("Predict")
    port.counters.rpc_finished("Predict", "OK", 0.2)
    port.counters.rpc_finished("Predict", "CANCELLED", 700)
    assert port.value("backend_rpcs_started_total", method="Predict") == 3
    assert port.value("backend_rpcs_finished_total", method="Predict", code="OK") == 1
    assert port.value("backend_rpcs_finished_total", method="Predict", code="CANCELLED") == 1
    assert port.value("backend_rpcs_in_flight", method="Predict") == 1
    bucket = "backend_rpc_duration_seconds_bucket"
    assert [port.value(bucket, method="Predict", le=le) for le in ("0.1", "0.25", "600.0", "1800.0", "+Inf")] == [
        0, 1, 1, 2, 2,
    ]  # fmt: skip
    assert port.value("backend_rpc_duration_seconds_sum", method="Predict") == 700.2


def test_streams(port: Port) -> None:
    stream = Stream(port.counters)
    stream.submitted(7)
    for _ in range(3):
        stream.output(2)
    stream.queued(0.02)
    assert port.value("backend_prompt_tokens_total") == 7
    assert port.value("backend_completion_tokens_total") == 6
    assert port.value("backend_first_token_seconds_count") == 1
    assert port.value("backend_inter_token_seconds_count") == 4
    assert port.value("backend_inter_token_seconds_bucket", le="+Inf") == 4
    assert port.value("backend_queue_seconds_bucket", le="0.01") == 0
    assert port.value("backend_queue_seconds_bucket", le="0.05") == 1


@pytest.mark.parametrize("state", State)
def test_state(port: Port, state: State) -> None:
    port.lifecycle.state = state
    values = {labels: value for (name, labels), value in port.samples().items() if name == "backend_state"}
    assert len(values) == len(State)
    assert [labels for labels, value in values.items() if value] == [(("state", state.value.replace(" ", "_")),)]


def test_seconds_since_the_load(port: Port) -> None:
    assert port.value("backend_loaded_seconds") is None
    port.lifecycle.loaded_at = time.monotonic() - 100
    assert (port.value("backend_loaded_seconds") or 0) >= 100


def test_the_process(port: Port) -> None:
    samples = port.samples()
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds"):
        assert samples[name, ()] > 0
    assert samples["backend_resident_memory_bytes", (("process", "server"),)] > 1_000_000


def test_the_process_wide_registry_is_served(port: Port) -> None:
    gauge = Gauge("vllm:of_a_test", "What vLLM would register.", ["model_name"])
    gauge.labels("m").set(3)
    try:
        assert port.value("vllm:of_a_test", model_name="m") == 3
    finally:
        REGISTRY.unregister(gauge)
    assert port.value("vllm:of_a_test", model_name="m") is None


def test_both_formats(port: Port) -> None:
    port.counters.rpc_started("Health")
    port.counters.rpc_finished("Health", "OK", 0.001)
    plain = {family.name for family in parse(port.get())}
    openmetrics = {
        family.name
        for family in parse_openmetrics(port.get(accept=OPENMETRICS))  # type: ignore[no-untyped-call]  # it has no types
    }
    ours = {name for name in openmetrics if name.startswith("backend_")}
    assert ours == {name.removesuffix("_total") for name in plain if name.startswith("backend_")}


def test_some_names_alone(port: Port) -> None:
    assert {family.name for family in parse(port.get("/metrics?name[]=backend_state"))} == {"backend_state"}


def test_every_metric_is_documented(port: Port) -> None:
    port.counters.rpc_started("Health")
    port.counters.rpc_finished("Health", "OK", 0.001)
    port.lifecycle.loaded_at = time.monotonic()
    served = {family.name for family in parse(port.get()) if family.name.startswith("backend_")}
    assert len(served) == 12
    documented = set(re.findall(r"^\| `(backend_\w+)` \|", DOCUMENTED.read_text(), re.MULTILINE))
    assert {name.removesuffix("_total") for name in documented} == {name.removesuffix("_total") for name in served}


@pytest.mark.filterwarnings("error")
def test_clients_that_misbehave_say_nothing_on_stderr(port: Port, capfd: pytest.CaptureFixture[str]) -> None:
    address = ("127.0.0.1", port.port)
    with socket.create_connection(address):
        pass
    with socket.create_connection(address) as client:
        client.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        client.recv(100)
    with socket.create_connection(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close resets
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    connection = http.client.HTTPConnection(*address)
    connection.request("POST", "/metrics", body=b"x" * 1000)
    assert connection.getresponse().status == 405
    connection.close()
    assert "backend_state" in port.get()
    assert capfd.readouterr() == ("", "")


def test_a_client_that_waits_holds_up_no_other(port: Port) -> None:
    with socket.create_connection(("127.0.0.1", port.port)):
        assert "backend_state" in port.get()


@contextlib.contextmanager
def bound(addr: str) -> Iterator[socket.socket]:
    listening = metrics_port.bind(addr)
    try:
        yield listening
    finally:
        listening.close()


def test_the_port_that_was_taken() -> None:
    with bound("127.0.0.1:0") as listening:
        address = metrics_port.address_of(listening)
        assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d*", address)
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))).close()


def test_a_port_in_use() -> None:
    with bound("127.0.0.1:0") as listening:
        address = metrics_port.address_of(listening)
        with pytest.raises(SettingsError) as caught:
            metrics_port.bind(address)
    assert str(caught.value) == f"--metrics-addr: cannot listen on {address}: Address already in use"


@pytest.mark.parametrize(
    ("addr", "reason"),
    [
        ("192.0.2.123:0", "Cannot assign requested address"),
        ("no-such-host.invalid:9090", ""),
        ("a..b:9090", "the host name is malformed"),
        (f"{'x' * 64}:9090", "the host name is malformed"),
    ],
)
def test_an_address_that_cannot_be_bound(addr: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        metrics_port.bind(addr)
    assert str(caught.value).startswith(f"--metrics-addr: cannot listen on {addr}: {reason}")
    assert "\n" not in str(caught.value)


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
def test_ipv6() -> None:
    with bound("[::1]:0") as listening:
        address = metrics_port.address_of(listening)
        assert address.startswith("[::1]:")
        socket.create_connection(listening.getsockname()[:2]).close()
    with bound("[::]:0") as listening:
        # As the gRPC port on this address.
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listening.getsockname()[1])).close()


async def test_in_the_background(caplog: pytest.LogCaptureFixture) -> None:
    listening = metrics_port.bind("127.0.0.1:0")
    port = Port.__new__(Port)
    port.port = listening.getsockname()[1]
    with caplog.at_level(logging.INFO):
        metrics_port.serve_in_background(listening, Counters(), cast("Lifecycle", FakeLifecycle()))
    assert f"http://127.0.0.1:{port.port}/metrics" in caplog.text
    text: Any = await asyncio.to_thread(port.get)
    assert 'backend_state{state="no_model"} 1.0' in text
    # The thread has no end but that of the process.
