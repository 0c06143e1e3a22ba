"""What install.sh chooses, refuses and asks of uv, on machines of every kind."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.machine import ROOT, Machine
from tests.packaging.test_profiles import PROFILES

# All that a small system without Python has, as far as install.sh needs it to plan.
SYSTEM = (
    *("bash", "sh", "awk", "cat", "cut", "dirname", "grep", "readlink", "sed", "sha256sum", "sort", "tr"),
    *("env", "mktemp", "cp", "rm", "mkdir", "timeout"),
)
WHEEL = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
# A uv that writes down its arguments, and makes an environment whose Python does nothing.
RECORDER = """
line="$*"
[ "$line" != --version ] || exit 0
echo "$line" >>"$RECORD"
case $line in
venv*)
    version=${line#*--python }
    mkdir -p .venv/bin .venv/lib
    printf '#!/bin/bash\\n[ "$1" != -c ] || echo %s\\n' "${version%% *}" >.venv/bin/python
    chmod +x .venv/bin/python ;;
*--constraints*)
    cp "${line##*--constraints }" "$RECORD.lock" ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What install.sh needs of the repository, with nothing installed."""
    folder = tmp_path / "a tree"
    folder.mkdir()
    for name in ("install.sh", "pyproject.toml", "packaging", "proto"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    return folder


class Uv:
    """install.sh in `tree` with the uv above; `calls` are its command lines."""

    def __init__(self, machine: Machine, tree: Path) -> None:
        self.machine, self.tree, self.record = machine, tree, machine.folder / "record"
        machine.command("uv", RECORDER)

    def install(self, *args: str, **environment: str) -> str:
        environment |= {"UV": str(self.machine.folder / "bin" / "uv"), "RECORD": str(self.record)}
        result = self.machine.install(*args, tree=self.tree, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    @property
    def calls(self) -> list[str]:
        return self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else []

    @property
    def constraints(self) -> str:
        return self.record.with_suffix(".lock").read_text(encoding="utf-8")


@pytest.fixture
def uv(machine: Machine, tree: Path) -> Uv:
    return Uv(machine, tree)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_plan(profile: str, machine: Machine) -> None:
    machine.suits(profile)
    plan = machine.plan(profile)
    assert plan["profile"] == f"{profile} (as asked)"
    assert plan["Python"] == PROFILES[profile]["python"][0]
    assert plan["vLLM"] == "from a wheel"
    assert plan["lock"].startswith(f"packaging/locks/{profile}.txt, ")
    assert " with hashes (" in plan["lock"]
    assert ("; from ranges: " in plan["lock"]) == (profile not in {"cuda13", "l4t"})
    assert plan["disk"].startswith(f"{PROFILES[profile]['disk']} GiB needed, 100 GiB free")
    assert plan["to do"].startswith(("install in ", "nothing, it is installed in "))


def no_gpu(machine: Machine) -> None:
    """As it is."""


def jetson_with_a_driver(machine: Machine) -> None:
    machine.nvidia("580.00")
    machine.jetson("38")


def smi(machine: Machine) -> None:
    machine.command("nvidia-smi", "echo 565.57.01; echo 565.57.01")


DETECTED: list[tuple[Callable[[Machine], None], str]] = [
    (no_gpu, "cpu (no GPU driver was found)"),
    (lambda machine: machine.nvidia("580.65.06"), "cuda13 (NVIDIA driver 580.65.06 was found)"),
    (lambda machine: machine.nvidia("1001.2"), "cuda13 (NVIDIA driver 1001.2 was found)"),
    (lambda machine: machine.nvidia("575.57.08"), "cuda12 (NVIDIA driver 575.57.08 was found)"),
    (smi, "cuda12 (NVIDIA driver 565.57.01 was found)"),
    (lambda machine: machine.amd("7.2.0"), "rocm (an AMD GPU: /dev/kfd is there)"),
    (lambda machine: machine.intel(), "xpu (a graphics card by Intel: /sys/class/drm/renderD128/device)"),
    (lambda machine: machine.intel("0000:00:02.0"), "cpu (no GPU driver was found)"),
    (jetson_with_a_driver, "l4t (a Jetson: /etc/nv_tegra_release is there)"),
]


@pytest.mark.parametrize(("prepare", "profile"), DETECTED, ids=[profile for _, profile in DETECTED])
def test_auto_says_what_it_found(prepare: Callable[[Machine], None], profile: str, machine: Machine) -> None:
    prepare(machine)
    assert machine.plan("auto")["profile"] == profile


def without_avx2(machine: Machine) -> None:
    machine.file("proc/cpuinfo", "flags\t\t: fpu sse4_2 avx avx2x\n")


def glibc_by_ldd(machine: Machine) -> None:
    machine.command("getconf", "exit 127")
    machine.command("ldd", "echo 'ldd (GNU libc) 2.38'; echo Copyright")


def musl(machine: Machine) -> None:
    machine.command("getconf", "exit 1")
    machine.command("ldd", "echo musl libc >&2; exit 1")


HINT = " (to install for another machine: --elsewhere)"
REFUSED: list[tuple[str, str, Callable[[Machine], None], str]] = [
    (
        "riscv",
        "cpu",
        lambda m: m.command("uname", "echo riscv64"),
        "cpu is for x86_64 or aarch64, this machine is riscv64",
    ),
    ("arm", "rocm", lambda m: m.command("uname", "echo aarch64"), "rocm is for x86_64, this machine is aarch64"),
    (
        "old glibc",
        "cpu",
        lambda m: m.command("getconf", "echo glibc 2.27"),
        "cpu has wheels for glibc 2.28 or newer, this system has 2.27",
    ),
    (
        "glibc for rocm",
        "rocm",
        lambda m: m.command("getconf", "echo glibc 2.36"),
        "rocm has wheels for glibc 2.39 or newer, this system has 2.36",
    ),
    (
        "glibc by ldd",
        "rocm",
        glibc_by_ldd,
        "rocm has wheels for glibc 2.39 or newer, this system has 2.38",
    ),
    ("musl", "cpu", musl, "cpu needs glibc, which this system does not use"),
    ("no AVX2", "cpu", without_avx2, "cpu needs a CPU with AVX2, and /proc/cpuinfo does not list it" + HINT),
    (
        "no driver",
        "cuda13",
        no_gpu,
        "cuda13 needs the NVIDIA driver 580 or newer, and none answers here" + HINT,
    ),
    (
        "a driver of CUDA 12",
        "cuda13",
        lambda m: m.nvidia("570.86.15"),
        "cuda13 needs the NVIDIA driver 580 or newer, this is 570.86.15; update it, or take cuda12" + HINT,
    ),
    (
        "an old driver",
        "auto",
        lambda m: m.nvidia("470.223.02"),
        "cuda12 needs the NVIDIA driver 525 or newer, this is 470.223.02; update it" + HINT,
    ),
    (
        "a silent driver",
        "auto",
        lambda m: m.file("dev/nvidiactl", ""),
        "an NVIDIA GPU is here, but nvidia-smi does not say which driver; for the CPU: ./install.sh cpu",
    ),
    ("no AMD GPU", "rocm", no_gpu, "rocm needs an AMD GPU, and /dev/kfd is not there" + HINT),
    (
        "no ROCm",
        "auto",
        lambda m: m.file("dev/kfd", ""),
        "rocm needs ROCm 7.2 or newer in /opt/rocm, and there is none" + HINT,
    ),
    ("old ROCm", "auto", lambda m: m.amd("6.4.1-83"), "rocm needs ROCm 7.2 or newer, /opt/rocm has 6.4.1-83" + HINT),
    (
        "no Intel GPU",
        "xpu",
        no_gpu,
        "xpu needs a GPU by Intel with its driver, and no /dev/dri/render* is one" + HINT,
    ),
    (
        "JetPack 6",
        "auto",
        lambda m: m.jetson("36"),
        "l4t needs Jetson Linux 38 (JetPack 7) or newer, this is 36" + HINT,
    ),
    (
        "no Jetson",
        "l4t",
        lambda m: m.command("uname", "echo aarch64"),
        "l4t needs a Jetson, and /etc/nv_tegra_release is not there" + HINT,
    ),
    ("no such profile", "cuda11", no_gpu, "no profile is called cuda11: use auto, " + " or ".join(PROFILES)),
]


@pytest.mark.parametrize(
    ("profile", "prepare", "sentence"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_a_refusal_is_one_sentence(profile: str, prepare: Callable[[Machine], None], sentence: str, uv: Uv) -> None:
    prepare(uv.machine)
    for dry in ([], ["--dry-run"]):
        assert uv.machine.refusal(profile, *dry, tree=str(uv.tree)) == sentence
    assert not uv.calls


def test_too_little_disk(machine: Machine, tree: Path) -> None:
    machine.disk(4)
    assert machine.refusal("cpu", tree=str(tree)) == f"cpu needs 5 GiB of free disk, {tree} has 4"


def test_a_python_that_has_no_wheels(machine: Machine, tmp_path: Path) -> None:
    sentence = "cpu has wheels for Python 3.11 or 3.12 or 3.13 or 3.14, not for 3.10"
    assert machine.refusal("cpu", "--dry-run", PYTHON_VERSION="3.10") == f"{sentence} (PYTHON_VERSION)"
    (tmp_path / WHEEL.replace("cp311", "cp310")).touch()
    assert machine.refusal("cpu", "--dry-run", PIP_FIND_LINKS=str(tmp_path)) == sentence
    machine.amd("7.2.0")
    assert machine.refusal("rocm", "--dry-run", PYTHON_VERSION="3.13") == (
        "rocm has wheels for Python 3.12, not for 3.13 (PYTHON_VERSION)"
    )


def test_for_another_machine(machine: Machine) -> None:
    without_avx2(machine)
    for profile in ("cpu", "cuda12", "cuda13", "rocm", "xpu"):
        assert machine.plan(profile, "--elsewhere")["profile"] == f"{profile} (as asked)"


def test_beyond_the_lock(machine: Machine) -> None:
    lock = machine.plan("cuda13", "--elsewhere", PYTHON_VERSION="3.13")["lock"]
    assert lock == "none for Python 3.13 on x86_64, versions from ranges"
    machine.command("uname", "echo aarch64")
    assert machine.plan("cpu")["lock"] == "none for Python 3.11 on aarch64, versions from ranges"


def test_wrong_usage(machine: Machine) -> None:
    assert machine.refusal("cpu", "cuda13") == "one profile at a time: cpu or cuda13"
    result = machine.install("--torch-backend", "cpu")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "install.sh: unknown argument: --torch-backend"


def test_a_dry_run_changes_nothing_and_needs_no_python(machine: Machine, tree: Path) -> None:
    for name in SYSTEM:
        program = shutil.which(name)
        assert program
        machine.command(name, f'exec {program} "$@"')
    before = {path: path.stat().st_mtime_ns for path in tree.rglob("*")}
    result = machine.install("--dry-run", tree=tree, PATH=str(machine.folder / "bin"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("profile  cpu (no GPU driver was found)\n")
    assert not result.stderr
    assert {path: path.stat().st_mtime_ns for path in tree.rglob("*")} == before


@pytest.mark.parametrize("profile", PROFILES)
def test_what_uv_is_asked(profile: str, machine: Machine, uv: Uv) -> None:
    machine.suits(profile)
    line = uv.install("--extra", "demo")
    assert line.startswith(f"install.sh: {profile} (")
    assert line.count("\n") == 1
    venv, packages, ours = uv.calls
    data = PROFILES[profile]
    assert f"--python {data['python'][0]} .venv" in venv
    assert f"pip install -r pyproject.toml --extra {profile} --extra=demo " in packages
    assert [word for word in packages.split() if word.startswith("https://")] == data.get("indexes", [])
    assert ("--torch-backend" in packages) == ("torch-backend" in data)
    assert ("--overrides" in packages) == ("overrides" in data)
    assert ("--index-strategy" in packages) == ("index-strategy" in data)
    assert uv.constraints == (ROOT / "packaging" / "locks" / f"{profile}.txt").read_text(encoding="utf-8")
    assert ours.startswith("pip install --quiet --no-deps --editable .")


def test_a_second_run_does_nothing_and_another_profile_starts_anew(machine: Machine, tree: Path, uv: Uv) -> None:
    uv.install()
    (tree / "common" / "pb" / "backend_pb2_grpc.py").touch()
    asked = uv.calls
    assert uv.install().startswith("install.sh: cpu (as installed before)")
    machine.disk(0)
    assert uv.install().startswith("install.sh: cpu (as installed before)")
    assert uv.calls == asked
    uv.install("--extra", "demo")
    assert not [call for call in uv.calls[len(asked) :] if call.startswith("venv")]
    machine.disk(100)
    machine.nvidia("580.65.06")
    asked = uv.calls
    assert uv.install().startswith("install.sh: cpu (as installed before)")
    assert uv.calls == asked
    assert uv.install("auto").startswith("install.sh: cuda13 (NVIDIA driver")
    assert uv.calls[len(asked)].startswith("venv --quiet --clear")


def test_what_is_asked_is_there_or_is_installed(tree: Path, uv: Uv) -> None:
    """Of the inputs as they are now: going back to a former commit is a change, too."""
    uv.install("--extra", "demo", "--extra", "test")
    (tree / "common" / "pb" / "backend_pb2_grpc.py").touch()
    asked = uv.calls
    for extras in ([], ["test"], ["demo"], ["test", "demo"]):
        uv.install(*(f"--extra={extra}" for extra in extras))
    assert uv.calls == asked
    uv.install("--extra", "bench")
    uv.install("--extra", "test", "--extra", "bench")
    assert len(uv.calls) == len(asked) + 2
    proto = tree / "proto" / "backend.proto"
    former = proto.read_text(encoding="utf-8")
    for text in (former + "// new", former):
        before = uv.calls
        proto.write_text(text, encoding="utf-8")
        uv.install()
        assert len(uv.calls) == len(before) + 2
    before = uv.calls
    uv.install("--extra", "demo")  # whose versions may be those of the other commit
    assert len(uv.calls) == len(before) + 2


def test_what_was_installed_half_is_not_installed(machine: Machine, tree: Path, uv: Uv) -> None:
    uv.install("cpu", "--extra", "demo")
    (tree / "common" / "pb" / "backend_pb2_grpc.py").touch()
    before = uv.calls
    machine.command("uv", RECORDER + 'case "$*" in *constraints*) exit 2 ;; esac')
    with pytest.raises(AssertionError, match="cpu was not installed"):
        uv.install("--extra", "bench")
    assert not (tree / ".venv" / "installed").exists()
    machine.nvidia("580.65.06")
    machine.command("uv", RECORDER)
    # The profile is as it was chosen.
    assert uv.install().startswith("install.sh: cpu (as installed before)")
    assert len(uv.calls) > len(before) + 2
    assert (tree / ".venv" / "installed").exists()


def test_a_release_of_python_counts_as_its_version(machine: Machine) -> None:
    """As images of Python have it in their environment."""
    assert machine.plan("cpu", PYTHON_VERSION="3.11.13")["Python"] == "3.11"
    assert machine.plan("cpu", PYTHON_VERSION="3.11.13")["lock"].startswith("packaging/locks/cpu.txt")
    assert machine.refusal("cpu", "--dry-run", PYTHON_VERSION="3.9.1").endswith("not for 3.9 (PYTHON_VERSION)")


def test_torch_from_a_folder(tmp_path: Path, uv: Uv) -> None:
    """Its index is left alone, what only that has is left out, and another build of torch is not held to the lock."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / WHEEL).write_bytes(b"not what was locked")
    line = uv.install(PIP_FIND_LINKS=f"{tmp_path} {tmp_path / 'wheels'}")
    assert f"torch from {tmp_path / 'wheels' / WHEEL}, lock: packaging/locks/cpu.txt" in line
    assert "from ranges" not in line
    packages = uv.calls[1]
    assert f"--find-links {tmp_path} --find-links {tmp_path / 'wheels'} " in packages
    assert "--overrides packaging/wheel-folder-overrides.txt" in packages
    assert "--torch-backend" not in packages
    lock = (ROOT / "packaging" / "locks" / "cpu.txt").read_text(encoding="utf-8")
    before, _, after = lock.partition("torch==")
    assert uv.constraints == before + after[after.index("\ntqdm==") + 1 :]


def test_uv_that_fails_leaves_one_sentence(machine: Machine, uv: Uv) -> None:
    machine.suits("rocm")
    machine.command("uv", RECORDER + 'case "$*" in *constraints*) echo "error: no route" >&2; exit 2 ;; esac')
    with pytest.raises(AssertionError) as caught:
        uv.install()
    message, sentence = (line.strip() for line in caught.value.args[0].splitlines()[:2])
    assert message == "error: no route"
    (index,) = PROFILES["rocm"]["indexes"]
    assert sentence == (
        "install.sh: rocm was not installed: uv's message is above. "
        f"vLLM comes from {index}, torch from {index}, and nothing else was taken in their place"
    )
    machine.command("uv", RECORDER)
    machine.command("uname", "echo aarch64")
    (machine.folder / "root" / "dev" / "kfd").unlink()
    assert uv.install().startswith("install.sh: cpu (no GPU driver was found)")
    assert uv.calls[-3].startswith("venv --quiet --clear")


@pytest.mark.parametrize(
    ("resources", "jobs"),
    [
        ((60, "max", 64), 20),
        ((60, "max", 2), 2),
        ((60, 9 << 30, 64), 3),
        ((2, "max", 64), 1),
        ((8, 90 << 30, 64), 2),
    ],
)
def test_jobs_of_a_build(resources: tuple[int, str | int, int], jobs: int, machine: Machine, tmp_path: Path) -> None:
    """GiB available, the cgroup's limit in bytes, cores."""
    available, limit, cores = resources
    machine.file("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {available << 20} kB\n")
    machine.file("sys/fs/cgroup/memory.max", f"{limit}\n")
    machine.command("nproc", f"echo {cores}")
    machine.command("g++", "echo 13.2.0")
    asked = {"FROM_SOURCE": "true", "VLLM_SOURCE": str(source(tmp_path))}
    assert machine.plan("cpu", **asked)["vLLM"] == f"from its source, MAX_JOBS={jobs}"
    assert machine.plan("cpu", **asked, MAX_JOBS="7")["vLLM"] == "from its source, MAX_JOBS=7"


def source(folder: Path) -> Path:
    (folder / "requirements" / "build").mkdir(parents=True, exist_ok=True)
    for name in ("cpu.txt", "xpu.txt", "build/cpu.txt"):
        (folder / "requirements" / name).touch()
    return folder


def test_a_build_that_cannot_start(machine: Machine) -> None:
    machine.suits("cuda13")
    asked = ("--dry-run", "cuda13")
    assert (
        machine.refusal(*asked, FROM_SOURCE="true")
        == "FROM_SOURCE=true builds vLLM for cpu and for xpu, not for cuda13"
    )
    machine.command("g++", "exit 127")
    asked = ("--dry-run", "cpu")
    assert machine.refusal(*asked, FROM_SOURCE="true") == (
        "FROM_SOURCE=true needs g++ 12.3 or newer, and there is none; CXX can name it"
    )
    machine.command("g++", "echo 12.2.0")
    assert machine.refusal(*asked, FROM_SOURCE="true") == (
        "FROM_SOURCE=true needs g++ 12.3 or newer, g++ is 12.2.0; CXX can name another"
    )
    machine.command("g++-13", "echo 13.1.0")
    machine.command("git", "exit 128")
    assert machine.refusal(*asked, FROM_SOURCE="true", CXX="g++-13") == (
        "FROM_SOURCE=true: v0.32.0 of https://github.com/vllm-project/vllm can't be reached; "
        "VLLM_SOURCE can name a folder with it"
    )
    assert machine.refusal(*asked, FROM_SOURCE="true", CXX="g++-13", VLLM_SOURCE="/dev") == (
        "VLLM_SOURCE=/dev is not the source of vLLM"
    )


@pytest.mark.parametrize("profile", ["cpu", "xpu"])
def test_a_build(profile: str, machine: Machine, tmp_path: Path, uv: Uv) -> None:
    machine.suits(profile)
    machine.command("g++", "echo 12.3.0")
    folder = source(tmp_path / "vllm")
    machine.command("uv", 'echo "$MAX_JOBS $VLLM_TARGET_DEVICE" >>"$RECORD.env"\n' + RECORDER)
    assert "vLLM from its source" in uv.install(FROM_SOURCE="true", VLLM_SOURCE=str(folder))
    _, requirements, build, _ = uv.calls
    assert f"-r {folder}/requirements/{profile}.txt" in requirements
    assert f"--extra {profile} " not in requirements
    assert build.strip() == f"pip install --no-deps --no-build-isolation {folder}"
    environments = uv.record.with_suffix(".env").read_text(encoding="utf-8").splitlines()
    assert environments[-2] == f"20 {profile}"
    (uv.tree / "common" / "pb" / "backend_pb2_grpc.py").touch()
    asked = uv.calls
    assert "(as installed before), Python 3.1" in uv.install(VLLM_SOURCE="/gone")
    assert uv.calls == asked
    assert "vLLM from a wheel" in uv.install(profile)
    assert uv.calls[len(asked)].startswith("venv --quiet --clear")
