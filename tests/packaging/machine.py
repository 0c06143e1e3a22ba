"""A machine as install.sh sees it: the files it reads stand under a folder, the commands it asks are first on PATH."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Neither this machine's folders of wheels nor its choices are the fixture's.
_NOT_PASSED = ("PYTHON_VERSION", "UV_FIND_LINKS", "FROM_SOURCE", "VLLM_SOURCE", "MAX_JOBS", "CXX", "UV")


@dataclass(frozen=True)
class Machine:
    """An x86-64 with AVX2, glibc 2.39, 100 GiB of free disk and no GPU, until told otherwise."""

    folder: Path

    def __post_init__(self) -> None:
        self.file("proc/cpuinfo", "flags\t\t: fpu sse4_2 avx avx2 avx512f\n")
        self.file("proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {60 << 20} kB\n")
        self.command("uname", "echo x86_64")
        self.command("getconf", "echo glibc 2.39")
        self.command("nvidia-smi", "exit 9")
        self.command("nproc", "echo 64")
        self.disk(100)

    def file(self, name: str, text: str) -> None:
        """`name` is a path without its leading slash."""
        path = self.folder / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def command(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
        path.chmod(0o755)

    def disk(self, gib: int) -> None:
        header = "Filesystem 1024-blocks Used Available Capacity Mounted on"
        self.command("df", f"printf '%s\\n' '{header}' '/dev/x 1 1 {gib << 20} 1% /'")

    def nvidia(self, driver: str) -> None:
        line = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (x@y)\n"
        self.file("proc/driver/nvidia/version", line)

    def amd(self, rocm: str) -> None:
        self.file("dev/kfd", "")
        self.file("opt/rocm/.info/version", f"{rocm}\n")

    def intel(self, address: str = "0000:03:00.0") -> None:
        """A GPU by Intel at this PCI address."""
        device = self.folder / "root" / "sys" / "devices" / address
        self.file(f"sys/devices/{address}/vendor", "0x8086\n")
        node = self.folder / "root" / "sys" / "class" / "drm" / "renderD128"
        node.mkdir(parents=True)
        (node / "device").symlink_to(device)

    def jetson(self, release: str) -> None:
        self.command("uname", "echo aarch64")
        self.file("etc/nv_tegra_release", f"# R{release} (release), REVISION: 4.0, GCID: 1, BOARD: generic\n")

    def suits(self, profile: str) -> None:
        """Becomes a machine that this profile is for."""
        match profile:
            case "cuda12":
                self.nvidia("535.183.01")
            case "cuda13":
                self.nvidia("580.82.07")
            case "rocm":
                self.amd("7.2.3-81")
            case "xpu":
                self.intel()
            case "l4t":
                self.jetson("38")

    def install(self, *args: str, tree: Path | str = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs install.sh of `tree` on this machine."""
        env = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED}
        env |= {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "BACKEND_MACHINE_ROOT": str(self.folder / "root"),
            "PIP_FIND_LINKS": "",
        }
        return subprocess.run(
            [Path(tree) / "install.sh", *args],
            env=env | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def plan(self, *args: str, **environment: str) -> dict[str, str]:
        """The lines of `--dry-run` by their first word."""
        result = self.install("--dry-run", *args, **environment)
        assert result.returncode == 0, result.stderr
        assert not result.stderr
        return {line[:9].strip(): line[9:] for line in result.stdout.splitlines()}

    def refusal(self, *args: str, **environment: str) -> str:
        """The one sentence that install.sh ends with before it has changed anything."""
        result = self.install(*args, **environment)
        assert result.returncode == 1
        assert not result.stdout
        (line,) = result.stderr.splitlines()
        return line.removeprefix("install.sh: ")
