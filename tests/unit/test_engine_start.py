"""What a start leaves behind; starts of real engines are in tests/process."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import engine_start, orphan_watch
from common.engine import Client
from common.engine_log import StageClock
from common.frontends import ALONE
from common.sharing import Admitted, Place, Shared


class Launched(Shared):
    """Several clients' engine that is up; of straw."""

    def greeted(self) -> Any:
        return pytest.MonkeyPatch.context()

    def adopt(self, llm: Any) -> None:
        llm.adopted = True


async def test_a_client_that_is_shut_leaves_no_counters_even_where_vllm_fails(tmp_path: Path) -> None:
    counters = tmp_path / "counters"
    counters.write_bytes(bytes(64))

    def shutdown(_timeout: float) -> None:
        raise OSError

    llm: Any = SimpleNamespace(shutdown=shutdown)
    with pytest.raises(OSError):
        await Client(llm, Admitted(Place(0, 2, {}, str(counters)))).shut()
    assert not counters.exists()


@pytest.mark.parametrize("comes_up", [True, False])
def test_the_counters_of_all_clients_go_with_a_load_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comes_up: bool
) -> None:
    counters = tmp_path / "counters"
    counters.write_bytes(bytes(64))
    place, llm = Place(0, 2, {}, str(counters)), SimpleNamespace(adopted=False)

    def build(_plan: Any, _config: Any, _throughput: Any, place: Place) -> Client:
        if not comes_up:
            raise RuntimeError
        return Client(llm, Admitted(place))

    launch: Any = None
    launched = Launched(b"", launch, [place], range(1))
    monkeypatch.setattr(engine_start, "Shared", SimpleNamespace(launch=lambda *_, **__: launched))
    monkeypatch.setattr(engine_start, "new_client", build)
    plan: Any = None
    frontends: Any = SimpleNamespace(count=2)
    if comes_up:
        client, shared = engine_start._launched(plan, plan, None, frontends, "")
        assert shared is launched
        assert client.llm.adopted
        assert counters.exists()
        assert client.admitted is not None
        client.admitted.close()
    else:
        with pytest.raises(RuntimeError):
            engine_start._launched(plan, plan, None, frontends, "")
    assert not counters.exists()


async def test_a_build_is_waited_for_also_where_its_watch_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else it would bring up an engine that is nobody's."""
    given_up, built = threading.Event(), threading.Event()

    def configure(_plan: Any) -> Any:
        assert given_up.wait(10)
        built.set()
        raise RuntimeError("the engine's processes are gone")

    def processes() -> list[Any]:
        given_up.set()
        return []

    async def watch(*_: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine_start, "adopt_orphans", lambda: None)
    monkeypatch.setattr(orphan_watch, "announce", lambda: None)
    monkeypatch.setattr(engine_start, "configure", configure)
    monkeypatch.setattr(engine_start, "built", watch)
    monkeypatch.setattr(engine_start, "_processes_of_the_load", processes)
    plan: Any = SimpleNamespace(engine_args={}, rank_timeout=1.0)
    with pytest.raises(RuntimeError, match="new thread"):
        await engine_start._start(plan, StageClock(lambda *_: None), ALONE, str(tmp_path))
    assert built.is_set()
