"""What a start leaves behind; starts of real engines are in tests/process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import engine_start
from common.engine import Client
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
