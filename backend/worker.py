"""`run.sh worker MODEL ...`: a supervised follower, which the orchestrator sees and which outlives its heads.

registered -> ranks started -> joined --head gone--> ranks killed -> ranks started, which wait for the next head
SIGTERM or SIGINT at any time: passed on to vLLM; once that has ended: drained, deregistered, exit with its status
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

from backend.flag_values import SettingsError
from backend.head_watch import Addresses, HeadWatch, Link, links_with, service_ports
from backend.logs import configure_logging
from backend.rank import Rank
from backend.shutdown import leave
from backend.worker_settings import WorkerSettings, parse_worker_settings
from common import node_memory, orphan_watch
from common.errors import InvalidRequest
from common.network import route_to
from common.processes import adopt_orphans, has_ended

logger = logging.getLogger(__name__)

RUN_SH = Path(__file__).resolve().parents[1] / "run.sh"
_LOOK_SECONDS = 0.25
_ROUTE_SECONDS = 0.5
# A second signal, or so many seconds after the first one, and what is left is killed.
_STOP_SECONDS = 30.0
# `timeout` and terminals send it to the process and to its group.
_SAME_SIGNAL_SECONDS = 0.5
# vLLM closes its connections seconds before its main process ends.
_END_SECONDS = 5.0
# Ranks that lived so long with a head, or waited so long for one (vLLM gives up after 5 min), were sound.
_SOUND_SECONDS = 60.0
_WAITED_SECONDS = 240.0
_MOST_FAILURES = 10
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0


def main(argv: Sequence[str], run_sh: Path = RUN_SH) -> NoReturn:
    """Register, supervise until a signal or until vLLM can't run; ends the process."""
    try:
        settings = parse_worker_settings(argv)
    except SettingsError as error:
        leave(2, str(error))
    configure_logging(settings.log_level, settings.log_format)
    leave(*asyncio.run(run(settings, run_sh)))


async def run(settings: WorkerSettings, run_sh: Path = RUN_SH) -> tuple[int, str | None]:
    """The exit status, and the cause where it is not vLLM that tells it."""
    adopt_orphans()
    orphan_watch.announce()
    supervisor = Supervisor(settings, run_sh)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop, number)
    if settings.register_to is None:
        return await supervisor.supervise(), None
    return await _run_registered(settings, settings.register_to, supervisor)


async def _run_registered(settings: WorkerSettings, url: str, supervisor: "Supervisor") -> tuple[int, str | None]:
    from backend.membership import Membership
    from backend.registration import Frontend, FrontendError, without_userinfo

    def node() -> Mapping[str, Any]:
        facts = node_memory.registration_facts()
        return {"name": settings.node_name, "node_type": "agent", "labels": dict(settings.node_labels), **facts}

    async with Frontend(url, settings.registration_token) as frontend:
        membership = Membership(frontend, node, node_memory.heartbeat_facts)
        joining, stopped = asyncio.create_task(membership.join()), asyncio.create_task(supervisor.stopped())
        await asyncio.wait([joining, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not joining.done():
            joining.cancel()
            return 0, None
        try:
            joining.result()
        except FrontendError as error:
            return 1, f"registering with {without_userinfo(url)} failed: {error}"
        staying = asyncio.create_task(membership.stay(settings.heartbeat_interval))
        staying.add_done_callback(_tell_failure)
        try:
            return await supervisor.supervise(), None
        finally:
            staying.cancel()
            await asyncio.wait([staying])
            await membership.leave()


def _tell_failure(staying: "asyncio.Task[None]") -> None:
    if not staying.cancelled() and (error := staying.exception()):
        logger.error("no heartbeats are sent any more", exc_info=error)


class Supervisor:
    """Keeps ranks running, one life after the other, until it is told to stop."""

    def __init__(self, settings: WorkerSettings, run_sh: Path = RUN_SH) -> None:
        self._settings = settings
        self._run_sh = run_sh
        self._rank: Rank | None = None
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._stopped_at = 0.0
        self._has_worked = False

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Pass `number` on to the ranks, and start none any more; the second time they are killed."""
        if not self._stop.is_set():
            self._stopped_at = time.monotonic()
        elif time.monotonic() - self._stopped_at > _SAME_SIGNAL_SECONDS:
            self._kill.set()
        self._stop.set()
        if self._rank is not None:
            logger.info("%s: passed on to vLLM", signal.Signals(number).name)
            self._rank.signal(number)

    async def stopped(self) -> None:
        """Wait for `stop`."""
        await self._stop.wait()

    async def supervise(self) -> int:
        """The exit status: of the ranks that were told to stop, or could not run."""
        failures, pause = 0, _FIRST_PAUSE
        while True:
            await self._route_to_head()
            if self._stop.is_set():
                return 0
            life = await self._live()
            self._has_worked = self._has_worked or life.has_met or life.waited
            if life.status is not None and self._stop.is_set():
                return life.status
            # vLLM's main process ends with 0 when an engine process has died.
            status = life.status or 1
            if life.status is not None and not self._has_worked:
                return status
            if life.status is None or life.is_sound:
                failures, pause = 0, _FIRST_PAUSE
                continue
            failures += 1
            if failures == _MOST_FAILURES:
                logger.error("the ranks failed %d times in a row", failures)
                return status
            logger.warning("the ranks ended with exit status %d; the next start is in %g s", life.status, pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def _route_to_head(self) -> None:
        """Wait for one: ranks started without would choose another card to be reached through, and keep it."""
        host, _ = self._settings.head
        told = False
        while not self._stop.is_set():
            try:
                await asyncio.to_thread(route_to, host)
            except InvalidRequest as error:
                if not told:
                    logger.warning("ranks are started once there is a way to their head: %s", error)
                told = True
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), _ROUTE_SECONDS)
            else:
                return

    async def _live(self) -> "_Life":
        settings = self._settings
        rank = await Rank.start(self._run_sh, settings.rank_argv, settings.rank_environment(os.environ))
        self._rank = rank
        logger.info("ranks started, process %d; their head is at %s port %d", rank.pid, *settings.head)
        if self._stop.is_set():
            rank.signal(signal.SIGTERM)
        life = _Life()
        ended = asyncio.create_task(rank.wait())
        lost = asyncio.create_task(self._head_is_gone(rank, life, ended))
        killed = asyncio.create_task(self._killing())
        try:
            await asyncio.wait([ended, lost, killed], return_when=asyncio.FIRST_COMPLETED)
            is_stuck = killed.done() and not ended.done()
            if ended.done():
                life.status = ended.result()
            elif is_stuck:
                logger.warning("the ranks did not end: killed")
            else:
                logger.warning("the head is gone: the ranks are ended, and started again for the next one")
        finally:
            self._rank = None
            lost.cancel()
            killed.cancel()
            await rank.end()
            status = await ended
        if is_stuck:
            life.status = status
        life.seconds = time.monotonic() - life.started
        return life

    async def _head_is_gone(self, rank: Rank, life: "_Life", ended: "asyncio.Task[int]") -> None:
        """Wait until it is, or until the ranks have `ended`; `life.met` tells whether there was one."""
        settings = self._settings
        services = service_ports(os.environ, settings.vllm_args)
        watch = HeadWatch(settings.handshake_port, settings.store_port, services)
        addresses = Addresses(settings.head[0])

        def look() -> tuple[list[psutil.Process], frozenset[Link]]:
            processes = rank.processes()
            return processes, watch.of_head(links_with(addresses(), processes))

        holders: list[psutil.Process] = []
        gone_since = math.inf
        while not (self._stop.is_set() or ended.done()):
            processes, links = await asyncio.to_thread(look)
            now = time.monotonic()
            if links and gone_since > now:
                holders = processes
            if watch.is_gone(links):
                gone_since = min(gone_since, now)
            # Connections that come again are with the next head.
            if gone_since <= now and (links or now - gone_since >= _patience(life, holders)):
                break
            if watch.met and life.met is None:
                life.met = now
                logger.info("connected with the head")
            await asyncio.wait([ended], timeout=_LOOK_SECONDS)
        if self._stop.is_set():
            await asyncio.wait([ended])  # which closes the connections too

    async def _killing(self) -> None:
        await self._stop.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._kill.wait(), _STOP_SECONDS)


def _patience(life: "_Life", processes: Iterable[psutil.Process]) -> float:
    """Seconds for ranks without connections to end by themselves, which is no fault of the head's.

    None where all `processes` still run and it would make no difference to the next start.
    """
    is_young = life.met is None or time.monotonic() - life.met < _SOUND_SECONDS
    return _END_SECONDS if is_young or any(map(has_ended, processes)) else 0.0


class _Life:
    """What became of ranks between their start and their end."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.seconds = 0.0
        self.met: float | None = None
        """When they first had a connection with the head."""
        self.status: int | None = None
        """With which they ended; None where we ended them because their head was gone."""

    @property
    def has_met(self) -> bool:
        """Whether there was a head."""
        return self.met is not None

    @property
    def waited(self) -> bool:
        """Whether they ended because no head came."""
        return self.met is None and self.seconds > _WAITED_SECONDS

    @property
    def is_sound(self) -> bool:
        """Whether it says nothing against starting them again at once."""
        return self.waited or (self.met is not None and self.started + self.seconds - self.met > _SOUND_SECONDS)
