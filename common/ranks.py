"""Waiting for the ranks of other machines: which are there, which are not, and when to give up.

vLLM waits for them without a limit and without a word. Which data-parallel ranks have come it tells its log at DEBUG,
where it is read here; nodes of tensor and pipeline parallelism are seen by their connections to `master_port`.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import psutil
from vllm.v1.engine.utils import wait_for_engine_startup

from common import topology
from common.engine_log import StageClock
from common.errors import LoadFailed
from common.processes import engine_processes
from common.topology import Missing, Parallel

T = TypeVar("T")

logger = logging.getLogger(__name__)

# vLLM's words for each message of a rank: HELLO or READY, local or remote, and its number.
HEARD = "%s from %s core engine process %s."
_LOOK_SECONDS = 0.5
# A rank that waits for us already is there within this time; nobody need be told to start it.
_GRACE_SECONDS = 2.0
# A connection that is gone for so many looks in a row is gone.
_LOOKS = 4
_MAPPED = "::ffff:"


@dataclasses.dataclass(frozen=True)
class Connections:
    """Who is connected to a port of ours, from elsewhere."""

    listening: bool
    peers: frozenset[tuple[str, int]]


class Ranks:
    """Those of other machines, of one load."""

    def __init__(self) -> None:
        self._parallel: Parallel | None = None
        self._args: Mapping[str, Any] = {}
        self._said: dict[int, str] = {}
        self._workers = 0
        self._began: float | None = None
        self._looks_without = 0
        self._strangers: frozenset[tuple[str, int]] = frozenset()
        self.missing: list[Missing] = []
        """As of the last look."""

    @contextlib.contextmanager
    def awaited(self, parallel: Parallel, args: Mapping[str, Any]) -> Iterator[None]:
        """While vLLM builds an engine in the block, look who comes; `args` are the head's engine arguments."""
        self._args = args
        self._parallel = parallel if topology.has_followers(parallel) else None
        vllm = logging.getLogger(wait_for_engine_startup.__module__)
        level, shown = vllm.level, vllm.getEffectiveLevel()

        def hear(record: logging.LogRecord) -> bool:
            if record.msg == HEARD and record.args and record.args[1] == "remote":  # type: ignore[index]
                status, _, rank = record.args
                self._said[int(str(rank))] = str(status)
            return record.levelno >= shown

        if self._parallel is not None:
            vllm.setLevel(logging.DEBUG)
            vllm.addFilter(hear)
        try:
            yield
        finally:
            vllm.removeFilter(hear)
            vllm.setLevel(level)
            self._parallel = None

    def look(self) -> None:
        """Bring `missing` up to date; takes a few milliseconds.

        Raises:
            LoadFailed: a rank has gone away again, and vLLM would wait for it for ever.

        """
        parallel = self._parallel
        if parallel is None:
            self.missing = []
            return
        data_parallel = topology.waits_for_ranks(parallel)
        processes = [psutil.Process(), *engine_processes()]
        found = connections(parallel.data_parallel_rpc_port if data_parallel else parallel.master_port, processes)
        if not data_parallel:
            self._workers = max(self._workers, len(found.peers))
        if found.listening and self._began is None:
            self._began = time.monotonic()
        if self._began is None or time.monotonic() - self._began < _GRACE_SECONDS:
            return
        self.missing = topology.missing(parallel, set(self._said), self._workers, self._args)
        if data_parallel:
            self._compare(found.peers)

    @property
    def remark(self) -> str:
        """What else is known of those that are missing; empty or a sentence."""
        if self._strangers:
            hosts = ", ".join(sorted({host for host, _ in self._strangers}))
            return f" {hosts} is connected and says nothing: a rank of an earlier head, which must be restarted."
        if self._workers:
            return f" {self._workers} of their workers are here."
        return ""

    def _compare(self, peers: frozenset[tuple[str, int]]) -> None:
        """Set what ranks have said against the connections; one holds from HELLO to READY."""
        starting = sorted(rank for rank, status in dict(self._said).items() if status == "HELLO")
        self._strangers = peers if self.missing and not starting else frozenset()
        self._looks_without = self._looks_without + 1 if len(peers) < len(starting) else 0
        if self._looks_without >= _LOOKS:
            ranks = topology.missing(self._parallel, [], 0, self._args) if self._parallel else []
            raise LoadFailed(
                f"of the data-parallel ranks {', '.join(map(str, starting))}, which had come, one went away before it"
                f" was ready; see its own log, and start it again: {'; '.join(map(str, ranks))}"
            )


async def built(building: "asyncio.Future[T]", ranks: Ranks, clock: StageClock, patience: float) -> T:
    """The result of `building`, which waits for `ranks`; the log and `clock` say which are missing.

    Raises:
        LoadFailed: some have not come within `patience` seconds, or one went away; `building` still runs then.

    """
    told: list[Missing] = []
    remark = warned = ""
    since: float | None = None
    while not building.done():
        await asyncio.wait([building], timeout=_LOOK_SECONDS)
        if building.done():
            break
        await asyncio.to_thread(ranks.look)
        clock.waiting = tuple(map(str, ranks.missing))
        if not ranks.missing:
            since = None
        elif since is None:
            since = time.monotonic()
        elif time.monotonic() - since > patience:
            raise LoadFailed(overdue(ranks, patience))
        if ranks.missing != told:
            for each in ranks.missing:
                logger.info("load: waiting for %s; it is started with: %s", each.ranks, each.line)
            if not ranks.missing:
                logger.info("load: all ranks of other machines have come")
            told = ranks.missing
        # In two looks, for whoever has just connected is about to speak.
        if ranks.remark == remark != warned and remark:
            logger.warning("load:%s", remark)
            warned = remark
        remark = ranks.remark
    clock.waiting = ()
    return building.result()


def overdue(ranks: Ranks, patience: float) -> str:
    """Why the load fails, with what would have helped."""
    lines = "; ".join(map(str, ranks.missing))
    return f"after {patience:g} s (rank_timeout) there is still no {lines}.{ranks.remark}"


def connections(port: int, processes: list[psutil.Process]) -> Connections:
    """Who is connected to `port` of these processes, from outside of them."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += process.net_connections("tcp")
    own = {_plain(each.laddr) for each in found if each.raddr}
    peers = {_plain(each.raddr) for each in found if each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED}
    listening = any(each.laddr.port == port and each.status == psutil.CONN_LISTEN for each in found)
    return Connections(listening, frozenset(peers - own))


def _plain(address: Any) -> tuple[str, int]:
    """Without the prefix that a socket of both families shows an IPv4 address with."""
    return str(address.ip).removeprefix(_MAPPED), int(address.port)
