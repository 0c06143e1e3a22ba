"""What processes that share an engine have in common."""

import contextlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine.admission_control import SharedAdmissionStats

from common.errors import InvalidRequest
from common.sharing import Admitted, Place, Shared, arguments, check


def places(folder: Path, count: int) -> list[Place]:
    path = folder / "counters"
    path.write_bytes(bytes(SharedAdmissionStats.num_counters(count) * SharedAdmissionStats.COUNTER_BYTES))
    return [Place(index, count, {"input_address": f"ipc://i{index}"}, str(path)) for index in range(count)]


class Client:
    """An AsyncLLM of straw."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.output_processor = SimpleNamespace(get_num_queued_tokens=lambda: self.tokens)
        self.get_num_queued_tokens: Any = None


async def test_requests_and_tokens_are_counted_over_all_clients(tmp_path: Path) -> None:
    clients, admitted, stats = [], [], []
    for place in places(tmp_path, 3):
        client = Client(tokens=10 * (place.index + 1))
        mine = Admitted(place)
        mine.watch(client)
        given = arguments(place, mine)
        assert given["client_addresses"]["input_address"] == f"ipc://i{place.index}"
        assert (given["client_count"], given["client_index"]) == (3, place.index)
        clients.append(client)
        admitted.append(mine)
        stats.append(SharedAdmissionStats(given["client_addresses"], 3, place.index))
    for number, each in enumerate(stats, 1):
        each.set_num_requests(number)
    assert [each.get_num_requests() for each in stats] == [6, 6, 6]
    assert [client.get_num_queued_tokens() for client in clients] == [60, 60, 60]
    # One's own are never stale; the others' are as of their last request, or look.
    clients[0].tokens = 0
    assert clients[0].get_num_queued_tokens() == 50
    clients[1].tokens = 0
    assert clients[0].get_num_queued_tokens() == 50
    admitted[1].refresh()
    assert clients[0].get_num_queued_tokens() == 30
    stats[2].set_num_requests(0)
    assert stats[0].get_num_requests() == 3
    for each in admitted:
        each.close()
    assert not (tmp_path / "counters").exists()  # it blocks nobody


def config(**parallel: Any) -> Any:
    defaults = {
        "local_engines_only": False,
        "data_parallel_size": 2,
        "data_parallel_size_local": 2,
        "data_parallel_backend": "mp",
        "enable_elastic_ep": False,
        "enable_fault_tolerance": False,
    }
    media = parallel.pop("mm_tensor_ipc", None)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**defaults | parallel),
        model_config=SimpleNamespace(multimodal_config=media and SimpleNamespace(mm_tensor_ipc=media)),
    )


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"data_parallel_size_local": 1}, "data_parallel_size_local"),
        ({"data_parallel_backend": "ray"}, "data_parallel_backend"),
        ({"enable_elastic_ep": True}, "enable_elastic_ep"),
        ({"enable_fault_tolerance": True}, "enable_fault_tolerance"),
        ({"mm_tensor_ipc": "torch_shm"}, "mm_tensor_ipc"),
    ],
)
def test_engines_that_can_have_one_client_only_are_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: .*--frontends 4; start the server without it"):
        check(config(**given), 4)


@pytest.mark.parametrize(
    "given",
    [{}, {"mm_tensor_ipc": "direct_rpc"}, {"local_engines_only": True, "data_parallel_size_local": 1}],
)
def test_all_others_can_have_several(given: dict[str, Any]) -> None:
    check(config(**given), 4)


@pytest.mark.parametrize("dies", [True, False])
def test_an_engine_that_dies_before_its_greeting_is_greeted_for(tmp_path: Path, dies: bool) -> None:
    sentinel, life = os.pipe()
    address = f"ipc://{tmp_path}/i"
    launch = SimpleNamespace(engine_manager=SimpleNamespace(sentinels=lambda: [sentinel]))
    place = Place(0, 2, {"input_address": address}, str(tmp_path / "counters"))
    shared = Shared(b"", launch, [place], range(2))
    heard: set[tuple[bytes, ...]] = set()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as client, shared.greeted():
        if dies:
            os.close(life)
        client.bind(address)
        client.rcvtimeo = 5000 if dies else 500
        with contextlib.suppress(zmq.Again):
            while len(heard) < 2:
                heard.add(tuple(client.recv_multipart()))
    assert heard == ({(b"\0\0", b""), (b"\1\0", b"")} if dies else set())
    if not dies:
        os.close(life)
    os.close(sentinel)
