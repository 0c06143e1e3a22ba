"""What the connections of ranks tell of their head."""

import os
import socket

import psutil
import pytest

from backend.head_watch import Addresses, HeadWatch, Link, links_with, service_ports


def links(*pairs: tuple[int, int]) -> frozenset[Link]:
    """Of local and remote ports."""
    return frozenset(Link(("10.0.0.2", local), ("10.0.0.1", remote)) for local, remote in pairs)


HANDSHAKE, STORE, PROXY = 29600, 29501, 3128
NONE = links()
SHAKE = links((1, HANDSHAKE))
JOINED = links((2, 41000), (3, 42000))
# A proxy, and a share of the head's machine.
OTHERS = links((7, PROXY), (8, 445))


def judged(watch: HeadWatch, looks: list[frozenset[Link]]) -> list[bool]:
    return [watch.is_gone(watch.of_head(look)) for look in looks]


@pytest.mark.parametrize("others", [NONE, OTHERS], ids=["", "others"])
@pytest.mark.parametrize(
    ("looks", "gone"),
    [
        ([NONE] * 5, False),  # no head yet
        ([NONE, SHAKE, SHAKE], False),
        ([SHAKE, SHAKE | JOINED, JOINED], False),
        ([SHAKE, JOINED], False),  # the handshake ended between two looks
        ([SHAKE, JOINED, links((2, 41000))], False),
        ([SHAKE, JOINED, NONE, JOINED], False),  # a look that missed them
        ([SHAKE, JOINED, NONE, NONE], True),
        ([SHAKE, NONE, NONE], True),
        ([SHAKE, links((9, HANDSHAKE))], True),  # connected anew, with another head
        ([SHAKE | JOINED, JOINED | links((9, HANDSHAKE))], True),
        ([JOINED, JOINED | SHAKE], False),
        ([SHAKE, SHAKE | links((4, HANDSHAKE))], False),  # a second rank of this node
        ([SHAKE | links((4, HANDSHAKE)), links((4, HANDSHAKE), (9, HANDSHAKE))], True),
    ],
)
def test_looks_at_data_parallel_ranks(looks: list[frozenset[Link]], gone: bool, others: frozenset[Link]) -> None:
    watch = HeadWatch(HANDSHAKE, None, {PROXY})
    assert judged(watch, [look | others for look in looks])[-1] is gone
    assert watch.met is any(look >= SHAKE for look in looks)


def test_a_service_that_nobody_knows_of_is_not_met() -> None:
    watch = HeadWatch(HANDSHAKE)
    assert not any(judged(watch, [JOINED, NONE, NONE, JOINED, NONE, NONE]))
    assert not watch.met


@pytest.mark.parametrize("others", [NONE, OTHERS | JOINED], ids=["", "others"])
def test_of_a_node_the_store_s_connections_count(others: frozenset[Link]) -> None:
    watch = HeadWatch(None, STORE)
    both, one, anew = links((1, STORE), (2, STORE)), links((2, STORE)), links((9, STORE))
    looks = [NONE, NONE, both, one, anew, NONE, anew, NONE]
    assert not any(judged(watch, [look | others for look in looks]))
    assert watch.met
    assert judged(watch, [others]) == [True]


def test_of_nodes_of_data_parallel_ranks_both_ports_tell() -> None:
    """A head that goes between the handshake and the meeting of the nodes is noticed, too."""
    for first in (SHAKE, links((1, STORE))):
        watch = HeadWatch(HANDSHAKE, STORE, {PROXY})
        assert judged(watch, [OTHERS, first, JOINED | OTHERS, OTHERS, OTHERS]) == [False, False, False, False, True]


def test_a_port_of_the_head_s_is_never_another_s() -> None:
    watch = HeadWatch(1023, None, {1023})
    assert judged(watch, [links((1, 1023)), NONE, NONE]) == [False, False, True]


@pytest.mark.parametrize(
    ("name", "value", "port"),
    [
        ("https_proxy", "http://proxy:3128", 3128),
        ("HTTP_PROXY", "http://user:1234@10.0.0.1:3128/", 3128),
        ("HTTP_PROXY", "http://user:1234@proxy", None),
        ("ALL_PROXY", "socks5h://[fd00::1]:1080", 1080),
        ("ALL_PROXY", "proxy:3128", 3128),
        ("NO_PROXY", "10.0.0.1:3128,head", None),
        ("HF_ENDPOINT", "https://mirror:8443/hub", 8443),
        ("HF_ENDPOINT", "https://mirror", None),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "HTTP://collector:4317", 4317),
        ("VLLM_CACHE_ROOT", "/var/cache:8080", None),
        # Kubernetes names the ports of every service so, the head's among them.
        ("HEAD_PORT_29550_TCP", "tcp://10.0.0.1:29550", None),
    ],
)
def test_ports_of_services(name: str, value: str, port: int | None) -> None:
    assert service_ports({name: value}) == ({port} if port else set())


def test_a_flag_can_name_a_service() -> None:
    words = ["--kv-transfer-config", '{"master": "http://10.0.0.1:8081", "port": 8082}', "--x=http://head:8083"]
    assert service_ports({}, words) == {8081, 8083}


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_connections_of_a_process(host: str, name: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound, both = ("::", True) if ":" in host else (host, False)
    ours = [psutil.Process()]
    with (
        socket.create_server((bound, 0), family=family, dualstack_ipv6=both) as server,
        socket.socket(family) as client,
    ):
        before = links_with(Addresses(name)(), ours)
        child = os.fork()
        if child == 0:  # the other end is another process's, as that of a head is
            client.close()
            accepted, _ = server.accept()
            accepted.recv(1)
            os._exit(0)
        try:
            client.connect((host, server.getsockname()[1]))
            (link,) = links_with(Addresses(name)(), ours) - before
            assert link.remote[1] == server.getsockname()[1]
            assert links_with({"192.0.2.1"}, ours) == frozenset()
        finally:
            client.close()
            os.waitpid(child, 0)
        assert links_with(Addresses(name)(), ours) - before == frozenset()


def test_what_they_have_accepted_is_a_client_s() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = links_with({"127.0.0.1"}, [psutil.Process()])
        child = os.fork()
        if child == 0:
            with socket.create_connection(server.getsockname()) as client:
                client.recv(1)
            os._exit(0)
        with server.accept()[0]:
            assert links_with({"127.0.0.1"}, [psutil.Process()]) == before
        os.waitpid(child, 0)


def test_connections_among_themselves_are_none_with_the_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = links_with({"127.0.0.1"}, [psutil.Process()])
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            assert links_with({"127.0.0.1"}, [psutil.Process()]) == before


def test_a_name_is_asked_for_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    answers: list[list[str] | None] = [None, ["10.0.0.1"], ["10.0.0.2"]]

    def getaddrinfo(*_args: object, **_more: object) -> list[tuple[object, ...]]:
        answer = answers.pop(0)
        if answer is None:
            raise OSError("no such name")
        return [(None, None, None, "", (address, 0)) for address in answer]

    monkeypatch.setattr("backend.head_watch.socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("backend.head_watch.time.monotonic", lambda: now[0])
    addresses = Addresses("head")
    seen = []
    for _ in range(4):
        seen.append(sorted(addresses()))
        assert sorted(addresses()) == seen[-1]
        now[0] += 11
        if not answers:
            break
    assert seen == [["head"], ["10.0.0.1", "head"], ["10.0.0.1", "10.0.0.2", "head"]]


def test_a_name_that_can_be_none_stands_for_itself() -> None:
    assert Addresses("a..b")() == {"a..b"}
