"""What a node says of its memory."""

from pathlib import Path

import pytest

from common import node_memory
from common.node_memory import MIB, GpuMemory, sum_of_nvidia


@pytest.mark.parametrize(
    ("lines", "memory"),
    [
        (["143771, 143167"], GpuMemory("nvidia", 143771 * MIB, 143167 * MIB)),
        (["100, 40", " 100 , 60 ", ""], GpuMemory("nvidia", 200 * MIB, 100 * MIB)),
        (["[N/A], [N/A]"], None),  # it has the machine's memory
        (["No devices were found"], None),
        ([], None),
    ],
)
def test_nvidia(lines: list[str], memory: GpuMemory | None) -> None:
    assert sum_of_nvidia(lines) == memory


def tool(folder: Path, text: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_tool_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    tool(tmp_path, 'test "$1" = --query-gpu=memory.total,memory.free && echo 10, 4')
    facts = {"total_vram": 10 * MIB, "available_vram": 4 * MIB, "gpu_vendor": "nvidia"}
    assert node_memory.registration_facts() == facts
    assert node_memory.heartbeat_facts() == {"available_vram": 4 * MIB}


def test_amd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(node_memory, "_DRM", tmp_path)
    for number, vendor in enumerate(("0x1002", "0x8086", "0x1002")):
        device = tmp_path / f"card{number}" / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "mem_info_vram_total").write_text("1000\n")
        (device / "mem_info_vram_used").write_text("300\n")
    assert node_memory.gpu_memory() == GpuMemory("amd", 2000, 1400)


@pytest.mark.parametrize("text", ["exit 9", "echo broken"])
def test_without_a_gpu_it_is_the_ram(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(node_memory, "_DRM", tmp_path)
    tool(tmp_path, text)
    assert node_memory.registration_facts() == {"total_vram": 0, "available_vram": 0, "gpu_vendor": ""}
    facts = node_memory.heartbeat_facts()
    assert list(facts) == ["available_ram"]
    assert int(str(facts["available_ram"])) > MIB
