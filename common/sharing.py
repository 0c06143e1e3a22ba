"""One engine with several processes as its clients: where each finds it, and what is admitted over all of them.

vLLM's `run_multi_api_server` in the words of a library: the engine is launched first, with an address for each client,
and each process then makes a client of its own. How many there are is fixed when the engine starts, and one that is
lost can't come back: the engine keeps sending to its address.
"""

import asyncio
import contextlib
import dataclasses
import mmap
import os
import threading
import uuid
from collections.abc import Iterator
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Self

import zmq
from vllm.config import VllmConfig
from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
from vllm.v1.engine.admission_control import SharedAdmissionStats
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.utils import CoreEngineLaunch, EngineZmqAddresses, launch_core_engines
from vllm.v1.executor import Executor

from common.errors import InvalidRequest

# How old the others' count of waiting prompt tokens may be: vLLM's hook is not called where a prefill ends.
_REFRESH_SECONDS = 0.25
# How soon an engine's death is noticed while this process's client is built.
_LOOK_SECONDS = 0.2
# Of a process's slot in the shared counters the first number is vLLM's own.
_TOKENS = 1


@dataclasses.dataclass(frozen=True)
class Place:
    """One process's, among the clients of an engine.

    Attributes:
        index: from 0, which is the process that has started the engine.
        count: of all.
        addresses: what vLLM's client is told, by its own names.
        counters: path of the file with the shared counters.

    """

    index: int
    count: int
    addresses: dict[str, str]
    counters: str


class Admitted:
    """What all clients together have given to the engine: vLLM's shared counters, with one for prompt tokens added."""

    def __init__(self, place: Place) -> None:
        self._slot = place.index * SharedAdmissionStats.COUNTERS_PER_SLOT
        self._path = Path(place.counters)
        self._numbers = memoryview(_mapped(place.counters)).cast("q")
        self._llm: AsyncLLM | None = None
        self._refreshing: asyncio.Task[None] | None = None

    def __getitem__(self, index: int) -> int:
        return self._numbers[index]

    def __setitem__(self, index: int, value: int) -> None:
        """Called by vLLM for each request that comes or goes."""
        self._numbers[index] = value
        self.refresh()

    def watch(self, llm: AsyncLLM) -> None:
        """Count the waiting tokens of `llm`'s, and have it see those of all; call in the event loop."""
        self._llm = llm
        llm.get_num_queued_tokens = self.queued_tokens
        self._refreshing = asyncio.create_task(self._keep_fresh())

    def refresh(self) -> None:
        """Bring this process's number of waiting tokens up to date."""
        if self._llm is not None:
            self._numbers[self._slot + _TOKENS] = self._llm.output_processor.get_num_queued_tokens()

    def queued_tokens(self) -> int:
        """Prompt tokens of all processes' requests that are not through their prefill."""
        self.refresh()
        return sum(self._numbers[_TOKENS :: SharedAdmissionStats.COUNTERS_PER_SLOT])

    def close(self) -> None:
        """Let go of the client."""
        self._llm = None
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._path.unlink(missing_ok=True)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            self.refresh()


class Shared:
    """An engine that is being started for several clients.

    Attributes:
        config: a pickled `VllmConfig` for the others' clients; vLLM's client changes the one that it is given.
        places: one for each client.

    """

    def __init__(self, config: bytes, launch: CoreEngineLaunch, places: list[Place], ranks: range) -> None:
        self.config = config
        self.places = places
        self._launch = launch
        self._ranks = ranks

    @classmethod
    def launch(cls, config: VllmConfig, count: int, folder: str, *, log_stats: bool) -> Self:
        """Start the engine's processes, and wait until they are up; blocks.

        Raises:
            InvalidRequest: a kind of engine that can have one client only.

        """
        check(config, count)
        parallel = config.parallel_config
        # vLLM's words for an engine under several API servers.
        parallel._api_process_count, parallel._api_process_rank = count, -1
        name = f"{folder}/{uuid.uuid4().hex[:8]}"
        inputs = [f"ipc://{name}i{index}" for index in range(count)]
        outputs = [f"ipc://{name}o{index}" for index in range(count)]
        executor = Executor.get_class(config)
        # The clients bind what the engine connects to, also when that comes first.
        with launch_core_engines(config, executor, log_stats, EngineZmqAddresses(inputs, outputs)) as launch:
            pass
        parallel._api_process_rank = 0
        Path(name).write_bytes(bytes(SharedAdmissionStats.num_counters(count) * SharedAdmissionStats.COUNTER_BYTES))
        stats = launch.coordinator.get_stats_publish_address() if launch.coordinator else None
        places = [
            Place(
                index,
                count,
                {"input_address": inputs[index], "output_address": outputs[index]}
                | ({"stats_update_address": stats} if stats else {}),
                name,
            )
            for index in range(count)
        ]
        # As vLLM hands it to the engine's processes: classes of a model's own code by value.
        maybe_register_config_serialize_by_value()
        ranks = range(parallel.data_parallel_index, parallel.data_parallel_index + parallel.data_parallel_size_local)
        return cls(bytes(ForkingPickler.dumps(config)), launch, places, ranks)

    def forget(self) -> None:
        """Remove what `launch` has left for clients, where there is to be none."""
        Path(self.places[0].counters).unlink(missing_ok=True)

    @contextlib.contextmanager
    def greeted(self) -> Iterator[None]:
        """While vLLM builds this process's client in the block, which waits minutes for the greeting of each rank.

        Nobody watches the engine meanwhile, so one that dies is greeted for; `adopt` then finds it dead.
        """
        over = threading.Event()
        watching = threading.Thread(target=self._greet_for_the_dead, args=(over,), name="greeting", daemon=True)
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()

    def _greet_for_the_dead(self, over: threading.Event) -> None:
        sentinels = self._launch.engine_manager.sentinels()
        while not connection.wait(sentinels, _LOOK_SECONDS):
            if over.is_set():
                return
        with contextlib.ExitStack() as stack:
            context = stack.enter_context(zmq.Context())
            for rank in self._ranks:
                socket = stack.enter_context(context.socket(zmq.DEALER))
                socket.setsockopt(zmq.IDENTITY, rank.to_bytes(2, "little"))  # vLLM's name for it
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(self.places[0].addresses["input_address"])
                socket.send(b"")
            over.wait()

    def adopt(self, llm: AsyncLLM) -> None:
        """Make `llm` the client that watches the engine's processes and ends them, as one that has started them."""
        resources = llm.engine_core.resources
        resources.engine_manager, resources.coordinator = self._launch.engine_manager, self._launch.coordinator
        llm.engine_core.start_engine_core_monitor()


def arguments(place: Place, admitted: Admitted) -> dict[str, Any]:
    """What makes an `AsyncLLM` the client at that place."""
    return {
        "client_addresses": {**place.addresses, "mp_admission_counters": admitted},
        "client_count": place.count,
        "client_index": place.index,
    }


def check(config: VllmConfig, count: int) -> None:
    """Return where an engine of this configuration can have `count` clients in processes of their own.

    Raises:
        InvalidRequest: naming the engine argument.

    """
    parallel, media = config.parallel_config, config.model_config.multimodal_config
    without = f"can't be used with --frontends {count}; start the server without it"
    if not parallel.local_engines_only and parallel.data_parallel_size_local != parallel.data_parallel_size:
        raise InvalidRequest("data_parallel_size_local", f"data-parallel ranks of other machines {without}")
    if parallel.data_parallel_backend == "ray":
        raise InvalidRequest("data_parallel_backend", f"ray {without}")
    if parallel.enable_elastic_ep:
        raise InvalidRequest("enable_elastic_ep", without)
    if parallel.enable_fault_tolerance:
        raise InvalidRequest("enable_fault_tolerance", without)
    if media is not None and media.mm_tensor_ipc == "torch_shm":
        raise InvalidRequest("mm_tensor_ipc", f"torch_shm {without}")


def _mapped(path: str) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
