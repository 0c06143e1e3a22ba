"""The matrix units (AMX) of Intel CPUs, which a process must ask the kernel for before it uses them.

vLLM's attention kernel for bfloat16 uses them without asking. As a rule the library for the layers before it has asked,
but not where it found no use for them: a request of one token, the first after a load, killed the engine by SIGILL.
"""

import torch
from vllm.platforms import current_platform


def allow() -> None:
    """Ask for this process; of no effect without such units. vLLM calls it in every engine process (an entry point)."""
    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
