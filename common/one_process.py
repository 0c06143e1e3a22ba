"""A CPU engine in one process, where vLLM has two: one that schedules, and one that computes.

OpenMP reads its settings once, when a process starts, so vLLM computes in a process that it starts with them. Each of
the two then looks for the other's next message without ever sleeping, so that a whole core does nothing else. Here the
server starts the engine's process with those settings, and it computes itself: it has all cores, 640 MB less, and one
import of vLLM less to wait for at each load.
"""

import contextlib
import os
from concurrent.futures import Future

from vllm.config import VllmConfig
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput

from common.cpu_defaults import ONE_PROCESS
from common.processes import keep_large_blocks


class OneProcess(UniProcExecutor):  # type: ignore[misc]  # vLLM is untyped to us
    """vLLM's executor for a worker in its own process, which `cpu_defaults.ONE_PROCESS` names."""

    _cpus: set[int] | None = None

    def _init_executor(self) -> None:
        super()._init_executor()
        keep_large_blocks()  # now that what loading the weights took has been returned
        # Ranks have met by it, and there is only this one. Nobody would remove it where the process is killed.
        with contextlib.suppress(OSError):
            os.unlink(self._rendezvous)
        # OpenMP has bound this thread. Those that read and write the engine's sockets are started by it soon, and
        # would compete with it for its CPU.
        self._cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))

    def _distributed_args(self) -> tuple[str, int, int]:
        method, rank, local_rank = super()._distributed_args()
        self._rendezvous = method.removeprefix("file://")
        return method, rank, local_rank

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput | None] | None:
        """Run one step; in the first, this thread goes back to where it belongs."""
        if self._cpus is not None:
            os.sched_setaffinity(0, self._cpus)
            self._cpus = None
        return super().execute_model(scheduler_output, non_block)


def is_used(config: VllmConfig) -> bool:
    """Whether the engine of this configuration is one."""
    return bool(config.parallel_config.distributed_executor_backend == ONE_PROCESS)


def thread_settings(config: VllmConfig) -> contextlib.AbstractContextManager[None]:
    """A context in whose environment its process is to be started."""
    settings: contextlib.AbstractContextManager[None] = OMPProcessManager(config).configure_omp_envs(0, 0)
    return settings
