"""The metrics port of a server that is spawned, scraped all the time as a monitoring does, through loads and frees."""

import functools
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import grpc
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import (
    PORT_SECONDS,
    PROBE_SECONDS,
    STOP_SECONDS,
    Backend,
    eventually,
    free_port,
)
from tests.process.wire import ENDLESS, PARSERS, content, model_options, predict_options


class Scraper:
    """Scrapes every 50 ms while the block runs.

    Attributes:
        states: what `backend_state` said, without repetitions.
        failures: what went wrong.

    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._scrape, name="scraper", daemon=True)
        self.states: list[str] = []
        self.failures: list[str] = []
        self.worst = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()
        print(f"the slowest scrape took {self.worst * 1000:.0f} ms")

    def _scrape(self) -> None:
        while not self._done.wait(0.05):
            started = time.monotonic()
            try:
                text = scrape(self._url)
            except OSError as error:
                self.failures.append(str(error))
                continue
            self.worst = max(self.worst, time.monotonic() - started)
            (state,) = re.findall(r'^backend_state\{state="(\w+)"\} 1\.0$', text, re.MULTILINE)
            if self.states[-1:] != [state]:
                self.states.append(state)


def scrape(url: str) -> str:
    """What the port answers, with the deadline of a probe."""
    with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as response:  # noqa: S310  # http, of this machine
        return str(response.read().decode())


def total(url: str, name: str, **labels: str) -> float | None:
    """The sum of the samples of that name with these labels; None without any."""
    values = [
        sample.value
        for family in parse(scrape(url))
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return sum(values) if values else None


@pytest.fixture(scope="module")
def url() -> str:
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def own(url: str) -> Iterator[Backend]:
    """A server with a metrics port."""
    with Backend(env={"BACKEND_METRICS_ADDR": url.split("/")[2]}) as backend:
        backend.wait_for_health()
        yield backend


def test_scrapes_are_answered_from_the_import_of_vllm_to_the_end_of_a_load(
    own: Backend, url: str, scripted: Path
) -> None:
    assert total(url, "backend_state", state="no_model") == 1
    assert "vLLM imported" not in own.stderr
    with Scraper(url) as scraper:
        result = own.load(model_options(scripted, *PARSERS))
    assert result.success, result.message
    assert not scraper.failures
    assert "loading" in scraper.states
    assert total(url, "backend_state", state="ready") == 1
    assert (total(url, "backend_loaded_seconds") or 0) > 0
    assert (total(url, "backend_resident_memory_bytes", process="EngineCore") or 0) > 1_000_000


def test_requests_are_counted_by_us_and_by_vllm(own: Backend, url: str) -> None:
    # The model of the test before.
    replies = own.stream(predict_options(line("plain")))
    assert content(replies) == line("plain").content
    whole = own.call("Predict", predict_options(line("plain")))
    tokens = replies[-1].tokens + whole.tokens
    for name in ("backend_completion_tokens_total", "vllm:generation_tokens_total"):
        assert total(url, name) == tokens
    for name in ("backend_prompt_tokens_total", "vllm:prompt_tokens_total"):
        assert total(url, name) == replies[-1].prompt_tokens + whole.prompt_tokens
    assert total(url, "backend_first_token_seconds_count") == 1
    assert total(url, "backend_queue_seconds_count") == 2
    for method in ("LoadModel", "Predict", "PredictStream"):
        assert total(url, "backend_rpcs_finished_total", method=method, code="OK") == 1
        assert total(url, "backend_rpc_duration_seconds_count", method=method) == 1


def test_callers_that_go_away(own: Backend, url: str) -> None:
    with own.connection() as stub:
        stream = stub.PredictStream(predict_options(line("long"), **ENDLESS))
        next(stream)
        assert total(url, "backend_rpcs_in_flight", method="PredictStream") == 1
        stream.cancel()
    with own.connection() as stub, pytest.raises(grpc.RpcError):
        list(stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=0.5))
    for code in ("CANCELLED", "DEADLINE_EXCEEDED"):
        eventually(
            functools.partial(total, url, "backend_rpcs_finished_total", method="PredictStream", code=code),
            PROBE_SECONDS,
            code,
        )
    assert total(url, "backend_rpcs_in_flight", method="PredictStream") == 0


def test_the_numbers_of_an_engine_go_with_it_and_ours_go_on(own: Backend, url: str, scripted: Path) -> None:
    assert own.call("Free", pb.HealthMessage()).success
    assert "vllm:" not in scrape(url)
    before = total(url, "backend_completion_tokens_total")
    assert before
    result = own.load(model_options(scripted, *PARSERS, DisableLogStatus=True))
    assert result.success, result.message
    reply = own.call("Predict", predict_options(line("plain")))
    assert "vllm:" not in scrape(url)
    assert total(url, "backend_completion_tokens_total") == before + reply.tokens
    result = own.load(model_options(scripted, *PARSERS))
    assert result.success, result.message
    assert total(url, "vllm:generation_tokens_total") == 0
    assert total(url, "backend_completion_tokens_total") == before + reply.tokens
    assert own.stop().status == 0


def test_the_log_names_a_port_that_was_chosen() -> None:
    addr = f"127.0.0.1:{free_port()}"
    with Backend(addr=addr, argv=["--addr", addr, "--metrics-addr=[::1]:0"]) as backend:
        assert backend.wait_for_health() < PORT_SECONDS
        (url,) = eventually(
            lambda: re.findall(r"metrics on (http://\[::1\]:[1-9]\d*/metrics)$", backend.stderr, re.MULTILINE),
            PORT_SECONDS,
            "the address in the log",
        )
        assert total(url, "backend_state", state="no_model") == 1
        assert (total(url, "backend_rpcs_finished_total", method="Health", code="OK") or 0) >= 1


def test_a_metrics_port_in_use_ends_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        metrics = f"127.0.0.1:{taken.getsockname()[1]}"
        with Backend(env={"BACKEND_METRICS_ADDR": metrics}) as backend:
            assert backend.wait_for_exit(STOP_SECONDS) == 2
            (text,) = backend.stderr.splitlines()
    assert text == f"backend: --metrics-addr: cannot listen on {metrics}: Address already in use"


def test_without_the_flag_there_is_no_port() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        listening = [c.laddr.port for c in psutil.Process(backend.pid).net_connections("tcp") if c.status == "LISTEN"]
        assert listening == [int(backend.addr.rpartition(":")[2])]
