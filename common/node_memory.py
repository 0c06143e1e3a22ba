"""What a node tells the orchestrator of its memory: of its GPUs, where it has some, or its RAM."""

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterable
from pathlib import Path

from common.cpu_defaults import available_memory

MIB = 1024**2
_NVIDIA = ("nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits")
_NVIDIA_SECONDS = 5.0
_DRM = Path("/sys/class/drm")
_AMD = "0x1002"  # PCI vendor


@dataclasses.dataclass(frozen=True)
class GpuMemory:
    """Of all GPUs of one vendor together, bytes."""

    vendor: str
    """As the orchestrator calls it: `nvidia` or `amd`."""
    total: int
    free: int


def registration_facts() -> dict[str, object]:
    """The fields of a registration that are about memory; without a GPU all are empty."""
    gpus = gpu_memory()
    if gpus is None:
        return {"total_vram": 0, "available_vram": 0, "gpu_vendor": ""}
    return {"total_vram": gpus.total, "available_vram": gpus.free, "gpu_vendor": gpus.vendor}


def heartbeat_facts() -> dict[str, object]:
    """What is free now."""
    gpus = gpu_memory()
    return {"available_ram": available_memory()} if gpus is None else {"available_vram": gpus.free}


def gpu_memory() -> GpuMemory | None:
    """None where there is no GPU with memory of its own that says how much of it is free."""
    return _nvidia() or _amd()


def _nvidia() -> GpuMemory | None:
    try:
        answer = subprocess.run(_NVIDIA, capture_output=True, text=True, timeout=_NVIDIA_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return sum_of_nvidia(answer.splitlines())


def sum_of_nvidia(lines: Iterable[str]) -> GpuMemory | None:
    """Of lines like `143771, 143167`, MiB; a GPU that shares the machine's memory says `[N/A]`."""
    total = free = 0
    for line in lines:
        words = [word.strip() for word in line.split(",")]
        if len(words) == 2 and all(word.isdigit() for word in words):
            total, free = total + int(words[0]) * MIB, free + int(words[1]) * MIB
    return GpuMemory("nvidia", total, free) if total else None


def _amd() -> GpuMemory | None:
    total = used = 0
    for device in _DRM.glob("card[0-9]*/device"):
        with contextlib.suppress(OSError, ValueError):
            if (device / "vendor").read_text().strip() == _AMD:
                size, taken = (int((device / f"mem_info_vram_{what}").read_text()) for what in ("total", "used"))
                total, used = total + size, used + taken
    return GpuMemory("amd", total, total - used) if total else None
