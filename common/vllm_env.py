"""Environment that vLLM reads when it is imported and when it starts its processes; the user's own values win."""

import os

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


def prepare_environment() -> None:
    """Set what the user has not set. Call before vLLM is first imported."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
