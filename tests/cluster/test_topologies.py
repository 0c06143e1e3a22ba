"""`make test-cluster`: the other ways to spread an engine, addresses of all kinds, and what is left of a dead head."""

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.cluster.conftest import follower, head, heavy, needs_namespaces
from tests.cluster.lines import PATIENCE, answers, expected, in_background, options, waits, words_of
from tests.cluster.network import Network, Node
from tests.process.orchestrator import Backend, eventually, free_port
from tests.process.test_start import copy_of_the_tree

pytestmark = [needs_namespaces, heavy, pytest.mark.timeout(900)]

GONE_SECONDS = 5.0
EPHEMERAL = range(41000, 41200)


@pytest.fixture
def fresh() -> Iterator[list[Node]]:
    """Three machines whose way to the internet leads through another card than the way to each other."""
    with Network(3) as network:
        for node in network.nodes:
            for words in (
                "link add wan type veth peer name wan-end",
                "addr add 10.214.0.2/24 dev wan",
                "link set wan up",
                "link set wan-end up",
                "route add default via 10.214.0.1",
            ):
                node.run("ip", *words.split())
        yield network.nodes


def check_all_gone(backend: Backend) -> None:
    eventually(lambda: not backend.processes(), GONE_SECONDS, "all processes are gone")


def check_served(backend: Backend, ranks: tuple[int | None, ...] = (None,)) -> None:
    for rank in ranks:
        assert answers(backend, rank) == expected()


def listening(backend: Backend) -> set[int]:
    """The ports that the processes of a backend accept connections on, from other machines."""
    found = set()
    for process in [psutil.Process(backend.pid), *backend.children()]:
        # /proc/net of the process: that of its own namespace.
        for name in ("tcp", "tcp6"):
            for entry in Path(f"/proc/{process.pid}/net/{name}").read_text(encoding="ascii").splitlines()[1:]:
                _, local, _, state, *_ = entry.split()
                if state == "0A":
                    found.add(int(local.rpartition(":")[2], 16))
    return found


def test_a_head_without_a_rank_of_its_own(fresh: list[Node], scripted: Path) -> None:
    """DP=2 as 0+2; with the head's ports in a range that a firewall can be told of."""
    first, last = EPHEMERAL.start, EPHEMERAL.stop - 1
    fresh[0].run("sh", "-c", f"echo {first} {last} > /proc/sys/net/ipv4/ip_local_port_range")
    rpc_port = free_port()
    topology = options(
        scripted,
        data_parallel_size=2,
        data_parallel_size_local=0,
        data_parallel_address=fresh[0].address,
        data_parallel_rpc_port=rpc_port,
    )
    with head(fresh[0]) as backend, ExitStack() as followers:
        backend.wait_for_health()
        load = in_background(backend, topology)
        waits(backend, load, ranks=2)
        assert backend.call("Free", pb.HealthMessage()).success
        assert "cancelled" in load.result(10).message
        assert not backend.left()
        load = in_background(backend, topology)
        others = [
            followers.enter_context(follower(node, *words))
            for node, words in zip(fresh[1:], waits(backend, load, ranks=2), strict=True)
        ]
        result = load.result(PATIENCE)
        assert result.success, f"{result.message}\n{others[0].stderr[-4000:]}"
        assert not backend.engine_cores()
        check_served(backend, (0, 1, None))
        # Each took the card that leads to the head, and not the one that leads away.
        for each, node in zip((backend, *others), fresh, strict=True):
            assert f"VLLM_HOST_IP={node.address} GLOO_SOCKET_IFNAME=eth0 " in each.stderr
        served_on = int(backend.addr.rpartition(":")[2])
        assert {port for port in listening(backend) if port not in EPHEMERAL} <= {served_on, rpc_port}
        others[0].processes()
        others[0].signal_leader(signal.SIGKILL)
        assert others[0].wait_for_exit(GONE_SECONDS) == -signal.SIGKILL
        check_all_gone(others[0])


def test_tensor_parallel_over_two_nodes(fresh: list[Node], scripted: Path, tmp_path: Path) -> None:
    """By the head's name; the follower's run.sh is a copy in another place. Then Free, and once more."""
    for node in fresh[:2]:
        node.name_hosts({"head.example": fresh[0].address})
    topology = options(
        scripted,
        tensor_parallel_size=2,
        nnodes=2,
        master_addr="head.example",
        master_port=free_port(),
    )
    copy = copy_of_the_tree(tmp_path / "another place")
    with head(fresh[0]) as backend:
        backend.wait_for_health()
        impatient = pb.ModelOptions()
        impatient.CopyFrom(topology)
        impatient.Options.append("rank_timeout:1")
        result = backend.load(impatient)
        assert not result.success
        assert "node 1: run.sh serve" in result.message
        assert not backend.left()
        words = words_of(result.message.rpartition(".")[0])
        # This time the follower is there first.
        with follower(fresh[1], *words, run_sh=copy) as other:
            result = backend.load(topology)
            assert result.success, f"{result.message}\n{other.stderr[-4000:]}"
            check_served(backend)
            assert backend.status().memory.breakdown["weights"] > 0
            assert "head.example" in other.stderr
            other.processes()
            other.signal_leader(signal.SIGKILL)
            other.wait_for_exit(GONE_SECONDS)
            check_all_gone(other)


@pytest.mark.parametrize("named", [False, True], ids=["address", "name"])
def test_data_parallel_over_ipv6_alone(scripted: Path, named: bool) -> None:
    with Network(2, ipv6_only=True) as network:
        first, second = network.nodes
        address = first.address6
        if named:
            for node in network.nodes:
                node.name_hosts({"head6.example": address})
            address = "head6.example"
        topology = options(
            scripted,
            data_parallel_size=2,
            data_parallel_size_local=1,
            data_parallel_address=address,
            data_parallel_rpc_port=free_port(),
        )
        with head(first, host=f"[{first.address6}]") as backend:
            backend.wait_for_health()
            load = in_background(backend, topology)
            (words,) = waits(backend, load)
            assert address in words
            with follower(second, *words) as other:
                result = load.result(PATIENCE)
                assert result.success, f"{result.message}\n{other.stderr[-4000:]}"
                check_served(backend, (0, 1))


def test_tensor_parallel_over_ipv6_alone(scripted: Path) -> None:
    with Network(2, ipv6_only=True) as network:
        first, second = network.nodes
        topology = options(
            scripted, tensor_parallel_size=2, nnodes=2, master_addr=first.address6, master_port=free_port()
        )
        with head(first, host=f"[{first.address6}]") as backend:
            backend.wait_for_health()
            load = in_background(backend, topology)
            (words,) = waits(backend, load)
            with follower(second, *words) as other:
                result = load.result(PATIENCE)
                assert result.success, f"{result.message}\n{other.stderr[-4000:]}"
                check_served(backend)


def test_what_a_dead_head_leaves_does_not_hang_the_next(fresh: list[Node], scripted: Path) -> None:
    """Its follower was in the midst of its start, and still is when the next head opens the same port."""
    topology = options(
        scripted,
        data_parallel_size=2,
        data_parallel_size_local=1,
        data_parallel_address=fresh[0].address,
        data_parallel_rpc_port=free_port(),
    )
    impatient = pb.ModelOptions()
    impatient.CopyFrom(topology)
    impatient.Options.append("rank_timeout:30")
    with ExitStack() as stack:
        with head(fresh[0]) as backend:
            backend.wait_for_health()
            load = in_background(backend, topology)
            (words,) = waits(backend, load)
            stale = stack.enter_context(follower(fresh[1], *words))
            eventually(lambda: "all ranks of other machines have come" in backend.stderr, PATIENCE, "HELLO")
            backend.processes()
            backend.signal_leader(signal.SIGKILL)
            assert load.exception(10) is not None
            backend.wait_for_exit(5)
        with head(fresh[0]) as backend:
            backend.wait_for_health()
            result = backend.load(impatient)
            # What it says of the rank depends on how far that was; that it says so is what counts.
            print(f"\nwith a rank of the dead head: {result.message}")
            assert not result.success
            assert re.search(r"rank 1|engine 1", result.message)
            stale.signal_leader(signal.SIGKILL)
            check_all_gone(stale)
            with follower(fresh[1], *words):
                result = backend.load(topology)
                assert result.success, result.message
                check_served(backend, (0, 1))
