"""Which CPUs the threads of a CPU engine are bound to.

vLLM's own choice (`auto`) is one CPU of each core, one core left to its scheduler. It does not see a control group's
quota: on 64 cores with the time of two, 63 threads would wait for each other most of the time. There the same rule is
applied here, to as many cores as the time is for. An engine in one process (see `one_process`) has no scheduler that
would take a core: it gets all, but for one that is left to the server where there are many.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from common import cgroup

VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"
_CPUS = Path("/sys/devices/system/cpu")
# From so many cores on, one that the engine lacks is less than what threads lose that wait for one that is disturbed.
MANY = 8
# What users may say of memory nodes and of cores to spare; vLLM's own choice takes it into account.
_ABOUT_NODES = ("CPU_VISIBLE_MEMORY_NODES", "VLLM_CPU_SIM_MULTI_NUMA", "VLLM_CPU_NUM_OF_RESERVED_CPU")
# What the user says about it, if anything.
_GIVEN = os.environ.get(VARIABLE)


def bind(ranks: int) -> str:
    """Set the variable for the next engine; returns what it is and why.

    Args:
        ranks: worker processes; 0: the engine is one process.

    """
    if _GIVEN:
        return f"{VARIABLE}={_GIVEN}, as given"
    cores = _cores(sorted(os.sched_getaffinity(0)))
    said = [name for name in _ABOUT_NODES if os.environ.get(name)]
    if ranks or said:
        value, why = choose([cpu for _, cpu in cores], cgroup.processors(), ranks or 1)
    else:
        value, why = choose_for_one_process(_near(cores), cgroup.processors())
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


def choose_for_one_process(cores: Sequence[int], quota: float | None) -> tuple[str, str]:
    """As `choose`, for an engine that is one process."""
    usable = cores if quota is None else cores[: max(int(quota), 1)]
    why = _counted(len(cores), "core") + (f" and a quota of {quota:g}" if len(usable) < len(cores) else "")
    if len(usable) >= MANY:
        usable = usable[:-1]
    return ",".join(map(str, usable)), why


def _near(cores: Sequence[tuple[int, int]]) -> list[int]:
    """Those of the first memory node that may be used: an engine of one process has its memory there."""
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^Mems_allowed_list:\s*(\d+)", status, re.MULTILINE)
    allowed = int(found[1]) if found else 0
    return [cpu for node, cpu in cores if node == allowed] or [cpu for node, cpu in cores if node == cores[0][0]]


def _cores(cpus: Sequence[int]) -> list[tuple[int, int]]:
    """Of each core its memory node and the last of these CPUs, which is vLLM's choice too; sorted."""
    last: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        folder = _CPUS / f"cpu{cpu}"
        node = min((int(each.name[4:]) for each in folder.glob("node[0-9]*")), default=0)
        try:
            core = (folder / "topology/thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        last[node, core] = cpu
    return sorted((node, cpu) for (node, _), cpu in last.items())


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
