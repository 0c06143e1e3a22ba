"""The card and the address that lead to a machine; what the user says stays."""

import os
import socket

import pytest

from common import network
from common.errors import InvalidRequest
from common.network import Route, ipv6_address, is_loopback, is_public, own_address, route_to, use_route_to

VARIABLES = (network.HOST_IP, network.GLOO, network.NCCL)


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_GIVEN", {})
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def names(monkeypatch: pytest.MonkeyPatch, **known: list[str]) -> None:
    def look_up(host: str, _port: None, **_kwargs: object) -> list[object]:
        found = known.get(host.replace(".", "_"), [host] if host[0].isdigit() or ":" in host else [])
        if not found:
            raise socket.gaierror(-2, "Name or service not known")
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM, 0, "", (address, 0))
            for address in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_the_way_to_this_machine_itself() -> None:
    assert route_to("127.0.0.1") == Route("127.0.0.1", "lo")


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch)
    for look_up in (route_to, own_address):
        with pytest.raises(InvalidRequest, match="is neither an address nor a known name"):
            look_up("head.example")
    assert ipv6_address("head.example") is None


def test_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "route_to", lambda _host: Route("10.0.0.1", "eth1"))
    use_route_to("10.0.0.2")
    assert [os.environ[name] for name in VARIABLES] == ["10.0.0.1", "eth1", "=eth1"]
    # The next load may have no other machine.
    use_route_to("")
    assert not set(VARIABLES) & os.environ.keys()


def test_what_the_user_says_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(network, "_GIVEN", {network.GLOO: "ib0"})
    monkeypatch.setattr(network, "route_to", lambda _host: Route("10.0.0.1", "eth1"))
    monkeypatch.setenv(network.GLOO, "ib0")
    with caplog.at_level("INFO"):
        use_route_to("10.0.0.2")
    assert [os.environ[name] for name in VARIABLES] == ["10.0.0.1", "ib0", "=eth1"]
    assert "GLOO_SOCKET_IFNAME as given" in caplog.text
    use_route_to("")
    assert os.environ[network.GLOO] == "ib0"


def test_an_address_that_no_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "route_to", lambda _host: Route("10.0.0.1", ""))
    use_route_to("10.0.0.2")
    assert os.environ[network.HOST_IP] == "10.0.0.1"
    assert network.GLOO not in os.environ


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("head", False),
        ("10.0.0.1", False),
        ("192.168.1.1", False),
        ("127.0.0.1", False),
        ("100.64.0.1", False),
        ("fd00::1", False),
        ("fe80::1%eth0", False),
        ("8.8.8.8", True),
        ("0.0.0.0", True),  # noqa: S104  # the address that is warned of
        ("::", True),
        ("2001:4860:4860::8888", True),
    ],
)
def test_what_others_may_reach(
    address: str, public: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert is_public(address) is public
    warning = "unencrypted and open to everybody"
    monkeypatch.setattr(network, "interfaces", dict)
    monkeypatch.setattr(network, "route_to", lambda _host: Route(address, "eth0"))
    use_route_to("head.example")
    assert (warning in caplog.text) is public
    caplog.clear()
    # The card that is used is private, and the machine has another one; or it is to listen on all of them.
    monkeypatch.setattr(network, "route_to", lambda _host: Route("10.0.0.1", "eth0"))
    monkeypatch.setattr(network, "interfaces", lambda: {address: "eth1"})
    use_route_to("10.0.0.2")
    assert (warning in caplog.text) is public
    caplog.clear()
    monkeypatch.setattr(network, "interfaces", dict)
    use_route_to(address)
    assert (warning in caplog.text) is public


def test_an_address_that_nobody_else_can_reach(caplog: pytest.LogCaptureFixture) -> None:
    use_route_to("127.0.0.1")
    assert "other machines can't reach a head at 127.0.0.1" in caplog.text
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "10.0.0.1", "head")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_of_several_addresses_the_one_that_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: {"10.0.0.2": "eth0"})
    names(monkeypatch, head=["10.0.0.1", "10.0.0.2"], other=["10.0.0.8", "10.0.0.9"])
    assert own_address("head") == "10.0.0.2"
    assert own_address("other") == "10.0.0.8"
    assert own_address("10.0.0.7") == "10.0.0.7"


def test_names_of_ipv6_alone_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, six=["fd00::1"], both=["10.0.0.1", "fd00::1"])
    assert ipv6_address("six") == "fd00::1"
    assert ipv6_address("both") is None
    assert ipv6_address("fd00::1") is None
