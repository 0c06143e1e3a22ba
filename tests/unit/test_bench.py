"""The benchmark's arithmetic, and that its client sees what is sent."""

import contextlib
import dataclasses
import http.server
import json
import math
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.bench import client, plan, report, servers, systems
from tests.bench.__main__ import _turn, main
from tests.bench.asks import Ask, Fleet
from tests.bench.figures import (
    FIGURES,
    GRPC,
    HTTP,
    IDLE,
    IN_PROCESS,
    OURS,
    UNARY,
    Cell,
    Measured,
    Round,
    Summary,
    Verdict,
    figures,
    verdicts,
)
from tests.bench.observed import Observed, Stream, observed, percentile
from tests.bench.systems import Player, System, SystemFailedError

MANY = Cell("toy", "plain", 128, 128)


def round_of(**given: float) -> Round:
    values = dict.fromkeys(("tokens_per_s", "cpu", "slowest_rate", "gap_most", "first_p50"), 100.0)
    return {**dict.fromkeys(FIGURES, 1.0), **values, **given}


def measured(cell: Cell, **rounds: list[Round]) -> Measured:
    names = {"ours": OURS, "unary": OURS + UNARY, "http": HTTP, "grpc": GRPC}
    names |= {"in_process": IN_PROCESS, "in_process_unary": IN_PROCESS + UNARY}
    return Measured(cell, {name: rounds.get(key, [round_of()]) for key, name in names.items()})


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([3, 1, 2], 50, 2), ([1, 2], 50, 1), ([1, 2, 3, 4], 99, 4), ([7], 1, 7), (list(range(1, 101)), 99, 99)],
)
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_nothing_has_no_percentile() -> None:
    assert math.isnan(percentile([], 50))


def test_streams_are_summed_up() -> None:
    streams = [Stream([1.1, 1.2, 1.4], b"a", 1.5), Stream([1.3, 1.6], b"b", 1.7), Stream([1.8, 1.9], b"c", 2.0)]
    seen = observed(streams, 1.0, sent=10, received=70)
    assert seen.seconds == pytest.approx(1.0)
    assert seen.in_flight == 2  # the third began when both had ended
    assert seen.first == pytest.approx([0.1, 0.3, 0.8])
    assert [seen.gap_p50, seen.gap_most] == pytest.approx([0.1, 0.3])
    assert seen.slowest_rate == pytest.approx(1 / 0.3)
    assert seen.messages == 7
    assert seen.last == [b"a".hex(), b"b".hex(), b"c".hex()]


def test_whole_answers_are_in_flight_from_their_begin() -> None:
    assert observed([Stream([at], b"", at) for at in (1.0, 2.0, 3.0)], 0.5).in_flight == 3


def test_figures_are_by_token_or_by_request() -> None:
    turn = observed([Stream([1.0, 2.0], b"", 2.0)] * 4, 0.0, sent=40, received=80)
    of_tokens = figures([turn, turn], cpu=0.001, memory=(2**20, 2**21), tokens=80)
    assert of_tokens["tokens_per_s"] == 20
    assert of_tokens["requests_per_s"] == 2
    assert of_tokens["cpu"] == pytest.approx(12.5)
    assert of_tokens["messages"] == pytest.approx(0.2)
    assert (of_tokens["received"], of_tokens["sent"]) == (2, 10)
    assert (of_tokens["memory"], of_tokens["memory_all"]) == (1, 2)
    assert figures([turn, turn], cpu=0.001, memory=(1, 1), tokens=0)["cpu"] == pytest.approx(125)


def test_a_ratio_is_of_neighbours() -> None:
    # A machine that became half as fast in the second round.
    both = measured(
        MANY,
        ours=[round_of(tokens_per_s=90), round_of(tokens_per_s=45), round_of(tokens_per_s=96)],
        in_process=[round_of(tokens_per_s=100), round_of(tokens_per_s=50), round_of(tokens_per_s=100)],
    )
    assert both.ratio(OURS, "tokens_per_s", IN_PROCESS) == Summary(0.9, 0.9, 0.96)


def test_promises_hold_of_an_equal() -> None:
    found = list(verdicts([measured(MANY, ours=[round_of(cpu=50)])]))
    assert len(found) == 9
    assert all(verdict.holds for verdict in found)


@pytest.mark.parametrize(
    ("broken", "contender", "promise"),
    [
        ({"tokens_per_s": 94}, "ours", "tokens/s of ours to in process"),
        ({"tokens_per_s": 96}, "unary", "tokens/s of ours, unary"),
        ({"cpu": 301}, "ours", "CPU per token to in process"),
        ({"slowest_rate": 19}, "ours", "messages/s"),
        ({"gap_most": 151}, "ours", "longest wait"),
    ],
)
def test_a_promise_that_does_not_hold_is_found(broken: dict[str, float], contender: str, promise: str) -> None:
    rounds = {"ours": [round_of(cpu=50)], contender: [round_of(**{"cpu": 50, **broken})]}
    failed = [verdict.promise for verdict in verdicts([measured(MANY, **rounds)]) if not verdict.holds]
    assert [each for each in failed if promise in each]
    assert len([each for each in failed if "in process" in each or promise in each]) >= 1


def test_cost_that_grows_with_length_or_connections_is_found() -> None:
    of_many = measured(MANY, ours=[round_of(cpu=50)])
    longer = measured(Cell("toy", "plain", 128, 1024), ours=[round_of(cpu=53)])
    shared = measured(Cell("toy", "plain", 128, 128, 1), ours=[round_of(cpu=38)])
    beside = measured(Cell("toy", "plain", 128, 128, idle=IDLE), ours=[round_of(cpu=53)])
    failed = [verdict.promise for verdict in verdicts([of_many, longer, shared, beside]) if not verdict.holds]
    assert failed == [
        "CPU per token of 1,024 tokens to that of 128",
        "CPU per token of 128 connections to that of 1",
        "CPU per token beside 512 idle connections to that of none",
    ]


def test_a_first_message_that_is_late_is_found() -> None:
    one = measured(Cell("toy", "plain", 1, 128), ours=[round_of(first_p50=102.5)])
    (verdict,) = verdicts([one])
    assert (verdict.value, verdict.holds) == (2.5, False)


def test_a_report_keeps_what_was_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.plots.draw", lambda *_: None)  # drawn by an extra's library
    report.write(tmp_path, [measured(MANY)], list(verdicts([measured(MANY)])))
    one = Cell("toy", "plain", 1, 128)
    report.write(tmp_path, [measured(one, ours=[round_of(tokens_per_s=170)])], [])
    folder = tmp_path / report.folder_name(report._machine()["CPU"])
    page = (folder / "README.md").read_text()
    assert page.index(f"### {one}") < page.index(f"### {MANY}")
    assert "| 170 |" in page
    assert len(json.loads((folder / report.RESULTS).read_text())["cells"]) == 2


def test_figures_of_two_machines_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Path, int]] = []
    monkeypatch.setattr("tests.bench.plots.draw", lambda folder, cells: drawn.append((folder, len(cells))))
    slow, fast = (Verdict("half as much", value, 0.5, at_least=False, aim=0.3) for value in (0.7, 0.4))
    folders = []
    for cpu, verdict in (("64 cores of Slow CPU", slow), ("2 cores of Fast(R) Processor @ 3 GHz", fast)):
        monkeypatch.setattr(report, "_machine", lambda cpu=cpu: {"CPU": cpu, "Python": "3"})
        folders.append(report.write(tmp_path, [measured(MANY)], [verdict]))
    assert [folder.name for folder in folders] == ["slow-64-cores", "fast-2-cores"]
    assert drawn == [(folder, 1) for folder in folders]
    for folder in folders:
        assert len(json.loads((folder / report.RESULTS).read_text())["cells"]) == 1
    page = (tmp_path / "README.md").read_text()
    assert "| [2 cores of Fast(R) Processor @ 3 GHz](fast-2-cores/README.md) | [64 cores of Slow CPU](" in page
    assert "| half as much | ≤ 0.500 | ≤ 0.300 | 0.400 | **0.700** |" in page
    assert "| half as much | 0.700 | ≤ 0.500 | **does not hold** | ≤ 0.300 |" in (folders[0] / "README.md").read_text()


def test_the_pages_in_docs_are_those_of_the_figures_there(tmp_path: Path) -> None:
    kept = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    report.write_pages(tmp_path)
    pages = [path.relative_to(kept) for path in kept.rglob("README.md")]
    assert len(pages) > 1
    for page in pages:
        assert (tmp_path / page).read_text() == (kept / page).read_text()


@pytest.mark.parametrize(
    ("cell", "rounds", "repeats"),
    [
        (Cell("toy", "plain", 1, 128), 3, 8),
        (Cell("toy", "plain", 1, 1024), 3, 1),
        (Cell("toy", "plain", 256, 1024), 3, 1),
        (Cell("smollm2", "plain", 1, 128), 3, 1),
        (Cell("smollm2", "plain", 32, 128), 3, 1),
        (Cell("smollm2", "plain", 256, 128), 2, 1),
        (Cell("embeddings", "embed", 1, 0), 3, 8),
    ],
    ids=str,
)
def test_how_often_a_cell_is_measured(cell: Cell, rounds: int, repeats: int) -> None:
    assert (plan.rounds(cell), plan.repeats(cell)) == (rounds, repeats)


def test_every_cell_is_of_a_fleet_and_quick_is_part_of_all() -> None:
    assert {cell.fleet for cell in plan.FULL} == set(plan.FLEETS)
    assert set(plan.QUICK) < set(plan.FULL)
    assert len(set(plan.FULL)) == len(plan.FULL)


def test_cells_that_there_are_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--fleet=toy", "--streams=129", "--dry"])
    assert main() == 2
    assert "no cell" in capsys.readouterr().err


def test_http_has_one_request_at_a_time_on_a_connection() -> None:
    systems: list[Any] = [kind.__new__(kind) for kind in (servers.Ours, servers.VllmHttp, servers.VllmGrpc)]
    every = dataclasses.replace(MANY, connections=0), dataclasses.replace(MANY, connections=8)
    asked = [{type(system) for _, system, _ in plan.contenders(cell, systems)} for cell in every]
    assert asked == [{servers.Ours, servers.VllmHttp, servers.VllmGrpc}, {servers.Ours, servers.VllmGrpc}]


def test_everybody_is_first_and_last_in_some_round() -> None:
    orders = [plan.in_order(number, "abcd") for number in range(8)]
    assert {order[0] for order in orders} == {order[-1] for order in orders} == set("abcd")


@pytest.fixture
def grpc_port() -> Iterator[int]:
    """A server that sends what it got, once more each time, 50 times; the last with 100 kB.

    It refuses "no", and answers "connections?" with their number.
    """

    def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        if request == b"no":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        if request == b"connections?":
            mine = psutil.Process().net_connections("tcp")
            here = [each for each in mine if each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED]
            yield str(len(here)).encode()
            return
        for number in range(1, 50):
            yield request * number
        yield request * 50_000

    class Handler(grpc.GenericRpcHandler):
        def service(self, _details: grpc.HandlerCallDetails) -> Any:
            return grpc.unary_stream_rpc_method_handler(answer)

    server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[Handler()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(0).wait()


@pytest.mark.parametrize("connections", [1, 2, 4])
def test_the_client_sees_every_message_of_grpc(grpc_port: int, connections: int) -> None:
    seen = client.play(client.Job("grpc", grpc_port, "/a.B/C", [b"ab".hex()] * 4, connections))
    assert seen.messages == 4 * 50
    assert {bytes.fromhex(last) for last in seen.last} == {b"ab" * 50_000}
    assert seen.received > 4 * 100_000


def test_idle_connections_are_open_beside(grpc_port: int) -> None:
    server = servers.Ours.__new__(servers.Ours)
    server.port = grpc_port
    with server.beside(Ask("plain", "", 1, stream=True), 5):
        seen = client.play(client.Job("grpc", grpc_port, "/a.B/C", [b"connections?".hex()] * 2, 2))
    assert [bytes.fromhex(last) for last in seen.last] == [b"7", b"7"]


def test_idle_connections_that_are_closed_are_noticed() -> None:
    server = servers.VllmHttp.__new__(servers.VllmHttp)
    with socket.create_server(("127.0.0.1", 0)) as listening, contextlib.ExitStack() as stack:
        server.port = listening.getsockname()[1]
        beside = contextlib.ExitStack()
        beside.enter_context(server.beside(Ask("plain", "", 1, stream=True), 2))
        stack.enter_context(listening.accept()[0])
        listening.accept()[0].close()
        with pytest.raises(SystemFailedError, match=r"^1 of 2 idle connections were closed"):
            beside.close()


def test_the_client_hears_of_a_refusal(grpc_port: int) -> None:
    with pytest.raises(ConnectionError):
        client.play(client.Job("http", grpc_port, "/", [b"{}".hex()], 1))


def test_who_asks_goes_on_after_a_refusal(grpc_port: int) -> None:
    asked = client.Job("grpc", grpc_port, "/a.B/C", [b"ab".hex()] * 2, 2)
    with Player() as player:
        for _ in range(2):
            with pytest.raises(SystemFailedError, match="too many"):
                player.play(dataclasses.replace(asked, bodies=[b"ab".hex(), b"no".hex()]))
            assert player.play(asked).messages == 2 * 50


class Refusing(System):
    name = "refusing"

    def argv(self) -> list[str]:
        return [sys.executable, "-c", "import sys; print('no memory', file=sys.stderr, flush=True); input()"]

    def wait_ready(self) -> None:
        self.wait_until(lambda: "memory" in self.log())

    def play(self, ask: Ask, streams: int, connections: int) -> Observed:
        raise SystemFailedError("an answer without a message")

    def tokens(self, ask: Ask, last: bytes) -> tuple[int, int]:
        return 0, 0


def test_a_system_that_fails_says_why() -> None:
    with Refusing(Fleet(Path(), {}), 1) as system:
        system.wait_ready()
        with pytest.raises(SystemFailedError, match=r"^refusing, 128 at once, 128 tokens: an answer.*\nno memory"):
            _turn(MANY, system, Ask("plain", "", 128, stream=True))


# As an engine's process is, it is slow to end, and it shares memory with others.
SHARING = """
import signal, sys, time
from multiprocessing import shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
memory = shared_memory.SharedMemory(create=True, size=4096)
print("memory", memory.name, file=sys.stderr, flush=True)
time.sleep(60)
"""


class Sharing(Refusing):
    def argv(self) -> list[str]:
        return [sys.executable, "-c", SHARING]


def test_what_a_system_has_shared_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "_STOP_SECONDS", 0.1)
    with Sharing(Fleet(Path(), {}), 1) as system:
        system.wait_ready()
        shared = Path("/dev/shm", system.log().split()[1])
        assert shared.exists()
        system.pause()  # which looks at its processes
    try:
        assert not shared.exists()
    finally:
        shared.unlink(missing_ok=True)


class Stopped(Refusing):
    def argv(self) -> list[str]:
        timeout = "from vllm import envs; timeout = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
        return [sys.executable, "-c", f"import sys; {timeout}; print('memory', timeout, file=sys.stderr); input()"]


def test_a_system_may_be_stopped_for_long_in_a_step() -> None:
    with Stopped(Fleet(Path(), {}), 1) as system:
        system.wait_ready()
        assert system.log().splitlines()[-1] == "memory 86400"


class Warming(servers.VllmGrpc):
    """Looks `looks` times whether it is ready; after the first it is."""

    looks = 0

    def __init__(self, port: int, states: health.HealthServicer) -> None:
        self.port, self._states = port, states

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        while not is_ready():
            self.looks += 1
            self._states.set("", health_pb2.HealthCheckResponse.SERVING)


def test_a_server_that_warms_its_engine_is_waited_for() -> None:
    states = health.HealthServicer()
    states.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    system = Warming(server.add_insecure_port("127.0.0.1:0"), states)
    server.start()
    try:
        system.wait_ready()
    finally:
        server.stop(None).wait()
    assert system.looks == 1
    with grpc.insecure_channel(f"127.0.0.1:{system.port}") as channel:
        assert not servers._is_serving(channel)


def test_a_fleet_that_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextlib.contextmanager
    def running(systems: list[System]) -> Iterator[None]:
        if systems[0].fleet.parsers:
            raise SystemFailedError("ours: out of memory")
        yield

    asked: list[Cell] = []

    def measure(cell: Cell, *_: object) -> Measured:
        asked.append(cell)
        return measured(cell)

    monkeypatch.setattr("tests.bench.__main__.signal.signal", lambda *_: None)  # they are pytest's
    monkeypatch.setattr("tests.bench.__main__.running", running)
    monkeypatch.setattr("tests.bench.__main__._measure", measure)
    monkeypatch.setattr("tests.bench.plan.ensure", Path)
    monkeypatch.setattr(sys, "argv", ["bench", "--dry", "--fleet", "parsers", "--fleet", "embeddings"])
    assert main() == 1
    assert asked == [cell for cell in plan.FULL if cell.fleet == "embeddings"]
    assert "parsers: ours: out of memory\n" in capsys.readouterr().err


class _Events(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        if self.path == "/whole":
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in (b'{"a": 1}', b'{"b": 2}', b"[DONE]"):
            line = b"data: " + event + b"\n\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize(("path", "messages", "last"), [("/events", 2, b'{"b": 2}'), ("/whole", 1, b'{"c": 3}')])
def test_the_client_sees_every_message_of_http(path: str, messages: int, last: bytes) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Events) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            job = client.Job("http", server.server_port, path, [b'{"c": 3}'.hex()] * 3, 3)
            seen = client.play(job)
        finally:
            server.shutdown()
    assert seen.messages == 3 * messages
    assert {bytes.fromhex(each) for each in seen.last} == {last}


def test_a_run_of_some_systems_judges_those_and_replaces_no_run_of_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.bench.plots.draw", lambda *_: None)
    report.write(tmp_path, [measured(MANY)], [])
    alone = Measured(MANY, {OURS: [round_of(tokens_per_s=7)]})
    found = list(verdicts([alone, Measured(Cell("toy", "plain", 128, 1024), {OURS: [round_of()]})]))
    assert [verdict.promise for verdict in found] == ["CPU per token of 1,024 tokens to that of 128"]
    report.write(tmp_path, [alone], found)
    (path,) = tmp_path.glob(f"*/{report.RESULTS}")
    (kept,) = json.loads(path.read_text())["cells"]
    assert IN_PROCESS in kept["rounds"]
    assert "| 7 |" in report.table(alone)
