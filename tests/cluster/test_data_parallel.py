"""Data parallel over two machines: what the head says while it waits, who answers, and what becomes of a late rank."""

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from common.pb import backend_pb2 as pb
from tests.cluster.conftest import follower, head, needs_namespaces
from tests.cluster.lines import PATIENCE, answers, expected, in_background, options, waits, words_of
from tests.cluster.network import Node
from tests.models.script import line
from tests.process.orchestrator import Backend, free_port
from tests.process.wire import predict_options

pytestmark = [needs_namespaces, pytest.mark.timeout(600)]

METRICS_PORT = 9400
# Both as vLLM counts them, by rank.
FINISHED = "vllm:request_success_total"
RUNNING = "vllm:num_requests_running"


def by_rank(node: Node, name: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{node.address}:{METRICS_PORT}/metrics", timeout=10) as response:
        families = parse(response.read().decode())
    found: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples if sample.name == name):
        rank = sample.labels["engine"]
        found[rank] = found.get(rank, 0.0) + sample.value
    return found


@pytest.fixture(scope="module")
def topology(nodes: list[Node], scripted: Path) -> pb.ModelOptions:
    return options(
        scripted,
        data_parallel_size=2,
        data_parallel_size_local=1,
        data_parallel_address=nodes[0].address,
        data_parallel_rpc_port=free_port(),
    )


@pytest.fixture(scope="module")
def backend(nodes: list[Node]) -> Iterator[Backend]:
    with head(nodes[0], "--metrics-addr", f"{nodes[0].address}:{METRICS_PORT}") as backend:
        backend.wait_for_health()
        yield backend


@pytest.fixture(scope="module")
def late(backend: Backend, topology: pb.ModelOptions) -> pb.Result:
    """What a load answers that nobody joins."""
    impatient = pb.ModelOptions()
    impatient.CopyFrom(topology)
    impatient.Options.append("rank_timeout:1")
    return backend.load(impatient)


@pytest.fixture(scope="module")
def served(backend: Backend, late: pb.Result, topology: pb.ModelOptions, nodes: list[Node]) -> Iterator[Backend]:
    """The head with its model, its other rank started by the line that Status has named."""
    load = in_background(backend, topology)
    (words,) = waits(backend, load)
    with follower(nodes[1], *words) as other:
        result = load.result(PATIENCE)
        assert result.success, f"{result.message}\n{other.stderr[-4000:]}"
        yield backend
        assert backend.call("Free", pb.HealthMessage()).success
        started = time.monotonic()
        other.signal_leader(15)
        assert other.wait_for_exit(30) == 0
        print(f"the follower ended {time.monotonic() - started:.1f} s after SIGTERM")


def test_a_load_that_nobody_joins_fails_with_the_line_that_would_help(
    late: pb.Result, topology: pb.ModelOptions
) -> None:
    assert not late.success
    assert "rank_timeout" in late.message
    assert "data-parallel rank 1" in late.message
    words = words_of(late.message.rpartition(".")[0])
    assert words[:3] == ["serve", topology.Model, "--headless"]


def test_the_log_names_what_is_missing_and_the_card(served: Backend, nodes: list[Node]) -> None:
    assert "waiting for data-parallel rank 1; it is started with: run.sh serve" in served.stderr
    assert "all ranks of other machines have come" in served.stderr
    assert f"VLLM_HOST_IP={nodes[0].address} GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0" in served.stderr


def test_each_rank_answers_as_one_node_does(served: Backend, nodes: list[Node]) -> None:
    for rank in (0, 1):
        before = by_rank(nodes[0], FINISHED)
        assert answers(served, rank) == expected()
        after = by_rank(nodes[0], FINISHED)
        grown = {name: after[name] - before[name] for name in after}
        assert grown == {"0": len(expected()) * (rank == 0), "1": len(expected()) * (rank == 1)}


def test_requests_that_are_not_pinned_are_shared(served: Backend, nodes: list[Node]) -> None:
    before = by_rank(nodes[0], FINISHED)
    assert answers(served) == expected()
    after = by_rank(nodes[0], FINISHED)
    assert all(after[rank] > before[rank] for rank in ("0", "1"))
    assert by_rank(nodes[0], RUNNING) == {"0": 0, "1": 0}


@pytest.mark.parametrize("rank", ["2", "-1", "1.0", "one", "٣", "1" * 400])
def test_a_rank_that_does_not_exist(served: Backend, rank: str) -> None:
    request = predict_options(line("plain"), Metadata={"data_parallel_rank": rank})
    with pytest.raises(grpc.RpcError) as caught:
        served.stream(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "0 to 1" in str(caught.value.details())


def test_memory_and_tokens_are_those_of_the_head(served: Backend) -> None:
    breakdown = served.status().memory.breakdown
    assert breakdown["weights"] > 0
    assert served.call("GetMetrics", pb.MetricsRequest()).tokens_generated > 0
