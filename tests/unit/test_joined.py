"""A further client of an engine that nobody waits for any more; clients that are used are in tests/process."""

import asyncio
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from common import joined
from common.joined import Seat


class Client:
    """As `engine.Client`."""

    def __init__(self) -> None:
        self.is_shut = False

    async def shut(self) -> None:
        self.is_shut = True


@pytest.mark.parametrize("comes_up", [True, False])
async def test_a_client_that_is_cancelled_while_it_is_built_is_closed(
    monkeypatch: pytest.MonkeyPatch, comes_up: bool
) -> None:
    begun, finish, client = threading.Event(), threading.Event(), Client()

    def build(_plan: Any, config: Any, _throughput: Any, _place: Any) -> Client:
        assert config.parallel_config._api_process_rank == 1
        begun.set()
        finish.wait(10)
        if not comes_up:
            raise RuntimeError
        return client

    monkeypatch.setattr(joined, "new_client", build)
    monkeypatch.setattr(joined, "load_general_plugins", lambda: None)
    config = pickle.dumps(SimpleNamespace(parallel_config=SimpleNamespace()))
    plan: Any = SimpleNamespace(engine_args={"disable_log_stats": True}, traces_endpoint=None)
    place: Any = SimpleNamespace(index=1)
    parsers: Any = None
    joining = asyncio.create_task(joined.join(pickle.dumps(Seat(plan, parsers, place, config))))
    await asyncio.to_thread(begun.wait, 10)
    joining.cancel()
    await asyncio.sleep(0.05)
    assert not joining.done()  # vLLM can't be interrupted, and what it builds is not left behind
    finish.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(joining, 10)
    assert client.is_shut is comes_up
