"""Which CPUs the threads of a CPU engine are bound to.

vLLM's own choice (`auto`) is one CPU of each core, one core left to its scheduler. It does not see a control group's
quota: on 64 cores with the time of two, 63 threads would wait for each other most of the time. There the same rule is
applied here, to as many cores as the time is for.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from common import cgroup

VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
_CPUS = Path("/sys/devices/system/cpu")
# What the user says about it, if anything.
_GIVEN = os.environ.get(VARIABLE)


def bind(ranks: int) -> str:
    """Set the variable for the next engine, of so many worker processes; returns what it is and why."""
    if _GIVEN:
        return f"{VARIABLE}={_GIVEN}, as given"
    cores = _cores(sorted(os.sched_getaffinity(0)))
    value, why = choose(cores, cgroup.processors(), ranks)
    os.environ[VARIABLE] = value
    return f"{VARIABLE}={value}, for {why}"


def choose(cores: Sequence[int], quota: float | None, ranks: int) -> tuple[str, str]:
    """The variable's value, and why.

    Args:
        cores: one CPU of each core, neighbours in memory together.
        quota: processor time that may be used, in cores; None: all.
        ranks: worker processes.

    """
    if quota is None or quota >= len(cores):
        return "auto", _counted(len(cores), "core")
    usable = list(cores[: max(int(quota), 1)])
    why = f"{_counted(len(cores), 'core')} and a quota of {quota:g}"
    if len(usable) < ranks:
        return "nobind", f"{why}: fewer than the {ranks} workers"
    # As vLLM does: a core for the scheduler beside each worker, where there are more.
    if len(usable) > ranks:
        usable = usable[: len(usable) - ranks] if len(usable) >= 2 * ranks else usable[:ranks]
    share, more = divmod(len(usable), ranks)
    lists, start = [], 0
    for rank in range(ranks):
        end = start + share + (rank < more)
        lists.append(",".join(map(str, usable[start:end])))
        start = end
    return "|".join(lists), why


def _cores(cpus: Sequence[int]) -> list[int]:
    """Of each core the last of these CPUs, which is vLLM's choice too; those of one memory node together."""
    last: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        folder = _CPUS / f"cpu{cpu}"
        node = min((int(each.name[4:]) for each in folder.glob("node[0-9]*")), default=0)
        try:
            core = (folder / "topology/thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        last[node, core] = cpu
    return [cpu for _, cpu in sorted((node, cpu) for (node, _), cpu in last.items())]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
