"""gRPC's statistics of connections: off, on, or not installed."""

import sys
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from backend.flag_values import SettingsError
from backend.server import build_server, import_channelz
from backend.settings import Settings
from tests.unit.test_server import FakeLifecycle, connected, raw, reflected, serving, status

if TYPE_CHECKING:
    from backend.lifecycle import Lifecycle

NAME = "grpc.channelz.v1.Channelz"


async def test_off_unless_it_is_asked_for() -> None:
    async with serving(FakeLifecycle()) as addr, connected(addr) as channel:
        assert NAME not in await reflected(channel)
        assert (await status(raw(channel, f"/{NAME}/GetServers", b"")))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_on() -> None:
    _, messages = pytest.importorskip("grpc_channelz") and import_channelz()
    async with serving(FakeLifecycle(), channelz=True) as addr, connected(addr) as channel:
        assert NAME in await reflected(channel)
        found = messages.GetServersResponse.FromString(await raw(channel, f"/{NAME}/GetServers", b""))
        assert sum(server.data.calls_started for server in found.server) >= 1


async def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc_channelz", cast("Any", None))
    monkeypatch.setitem(sys.modules, "grpc_channelz.v1", cast("Any", None))
    with pytest.raises(SettingsError, match=r"--channelz: needs the package grpcio-channelz; .*--extra channelz"):
        build_server(Settings(addr="", channelz=True), cast("Lifecycle", FakeLifecycle()))
