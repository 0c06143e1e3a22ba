"""What the connections of ranks tell of their head."""

import os
import socket

import psutil
import pytest

from backend.head_watch import Addresses, HeadWatch, Link, links_with


def links(*pairs: tuple[int, int]) -> frozenset[Link]:
    """Of local and remote ports."""
    return frozenset(Link(("10.0.0.2", local), ("10.0.0.1", remote)) for local, remote in pairs)


NONE = links()
SHAKE = links((1, 29600))
JOINED = links((2, 41), (3, 42))


@pytest.mark.parametrize(
    ("looks", "gone"),
    [
        ([NONE] * 5, False),  # no head yet
        ([NONE, SHAKE, SHAKE], False),
        ([SHAKE, SHAKE | JOINED, JOINED], False),
        ([SHAKE, JOINED], False),  # the handshake ended between two looks
        ([JOINED, links((2, 41))], False),
        ([JOINED, NONE, JOINED], False),  # a look that missed them
        ([JOINED, NONE, NONE], True),
        ([SHAKE, NONE, NONE], True),
        ([SHAKE, links((9, 29600))], True),  # connected anew, with another head
        ([SHAKE | JOINED, JOINED | links((9, 29600))], True),
        ([JOINED, JOINED | SHAKE], False),
        ([SHAKE, SHAKE | links((4, 29600))], False),  # a second rank of this node
        ([SHAKE | links((4, 29600)), links((4, 29600), (9, 29600))], True),
    ],
)
def test_looks(looks: list[frozenset[Link]], gone: bool) -> None:
    watch = HeadWatch(29600)
    assert [watch.is_gone(look) for look in looks][-1] is gone
    assert watch.met is any(looks)


def test_without_a_port_for_handshakes_only_the_last_connection_counts() -> None:
    watch = HeadWatch(None)
    assert not any(watch.is_gone(look) for look in (SHAKE, links((9, 29600)), NONE))
    assert watch.is_gone(NONE)


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
