"""Who can reach an address, and who can open a socket's file."""

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from backend.flag_values import SettingsError
from backend.server import build_server
from backend.settings import Settings
from backend.sockets import check_bindable, is_local, listen
from tests.unit.test_server import FakeLifecycle, serving

if TYPE_CHECKING:
    from backend.lifecycle import Lifecycle


@pytest.fixture
def lifecycle() -> FakeLifecycle:
    return FakeLifecycle()


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "a"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def exists(path: Path) -> bool:
    return path.exists()


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


async def test_a_socket_is_for_its_owner_alone(lifecycle: FakeLifecycle, path: Path, umask: int) -> None:
    # Nothing changes the mode later, so it is the one that the file was made with.
    async with serving(lifecycle, addr=f"unix:{path}"):
        assert mode(path) == 0o600
        assert os.umask(umask) == umask


async def test_the_umask_is_as_before_where_nothing_can_be_bound(
    lifecycle: FakeLifecycle, path: Path, umask: int
) -> None:
    addr = f"unix:{path.parent}/none/a"
    with pytest.raises(SettingsError):
        listen(build_server(Settings(addr=addr), cast("Lifecycle", lifecycle)), addr)
    assert os.umask(umask) == umask


async def test_the_file_goes_with_the_server(lifecycle: FakeLifecycle, path: Path) -> None:
    async with serving(lifecycle, addr=f"unix:{path}"):
        assert exists(path)
    assert not exists(path)


@pytest.mark.parametrize(
    ("addr", "local"),
    [
        ("127.0.0.1:5", True),
        ("127.8.9.1:5", True),
        ("localhost:5", True),
        ("[::1]:5", True),
        ("unix:/run/a", True),
        ("0.0.0.0:5", False),
        ("[::]:5", False),
        ("192.0.2.1:5", False),
        ("[2001:db8::1]:5", False),
        ("no-such-host.invalid:5", False),
        ("a..b:5", False),
    ],
)
def test_what_others_can_reach(addr: str, local: bool) -> None:
    assert is_local(addr) is local


# Of a family that no machine has, and of a machine that is not this one.
NO_FAMILY = (cast("socket.AddressFamily", 63), socket.SOCK_STREAM, 0, "", ("::1", 0, 0, 0))
NOT_HERE = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("192.0.2.123", 0))
HERE = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 0))


@pytest.mark.parametrize("absent", [NO_FAMILY, NOT_HERE])
def test_one_of_a_names_addresses_is_enough(absent: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ([absent, HERE], [HERE, absent]):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, found=found, **_kwargs: found)
        check_bindable("name:0")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: [absent])
    with pytest.raises(SettingsError, match=r"^cannot listen on name:0: (Cannot assign|Address family not supported)"):
        check_bindable("name:0")


@pytest.mark.parametrize("host", ["a..b", ".", "x" * 64, f"{'x' * 64}.example"])
def test_a_host_name_that_is_malformed(host: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_bindable(f"{host}:5")
    assert str(caught.value) == f"cannot listen on {host}:5: the host name is malformed"


def test_a_port_that_is_taken_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = [HERE, (*HERE[:4], taken.getsockname())]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: found)
        with pytest.raises(SettingsError, match="already in use"):
            check_bindable("name:0")
