"""The units: systemd's own verdict where there is a systemd, and their commands as the server and vLLM take them."""

import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.deploy.commands import DEPLOY, ROOT, follower, server

UNITS = {"vllm-backend.service": "backend.env", "vllm-worker.service": "worker.env"}
INSTALLED = "/opt/vllm-backend"


def read(name: str) -> dict[str, dict[str, list[str]]]:
    """Sections, their keys and all values of each."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    section = ""
    for line in (DEPLOY / "systemd" / name).read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals
            found[section][key].append(value)
    return found


def variables(name: str) -> dict[str, str]:
    """An environment file, without quotes and continued lines."""
    lines = (DEPLOY / "systemd" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def command(unit: str) -> list[str]:
    """The words of ExecStart, with the variables of the environment file, as systemd.service(5) has it."""
    environ = variables(UNITS[unit])
    (line,) = read(unit)["Service"]["ExecStart"]
    words: list[str] = []
    for word in line.split():
        if word.startswith("$") and not word.startswith("${"):
            words += shlex.split(environ[word[1:]])
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: environ[match[1]], word))
    return words


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_is_complete(unit: str) -> None:
    found = read(unit)
    assert set(found) == {"Unit", "Service", "Install"}
    service = found["Service"]
    assert service["EnvironmentFile"] == [f"/etc/vllm-backend/{UNITS[unit]}"]
    assert (service["KillMode"], service["User"]) == (["mixed"], ["vllm"])
    assert (service["LimitMEMLOCK"], service["RestartPreventExitStatus"]) == (["infinity"], ["2"])
    assert found["Install"]["WantedBy"] == ["multi-user.target"]
    assert command(unit)[0] == f"{INSTALLED}/run.sh"


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_it(unit: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return  # its keys and commands are checked by the others
    # A unit would have to quote the blank of a path that has one.
    place = tmp_path / "installed"
    place.symlink_to(ROOT)
    text = (DEPLOY / "systemd" / unit).read_text(encoding="utf-8").replace(INSTALLED, str(place))
    text = text.replace("User=vllm", "User=root").replace("EnvironmentFile=", "EnvironmentFile=-")
    (tmp_path / unit).write_text(text, encoding="utf-8")
    done = subprocess.run([analyze, "verify", str(tmp_path / unit)], capture_output=True, text=True, check=False)
    own = [line for line in (done.stdout + done.stderr).splitlines() if unit in line]
    assert own == []
    (tmp_path / unit).write_text(text.replace("KillMode", "KilMode"), encoding="utf-8")
    done = subprocess.run([analyze, "verify", str(tmp_path / unit)], capture_output=True, text=True, check=False)
    assert "KilMode" in done.stdout + done.stderr


def test_the_server_takes_its_command_and_its_environment() -> None:
    environ = variables("backend.env")
    settings = server(command("vllm-backend.service")[1:], environ)
    assert settings.addr == environ["BACKEND_ADDR"]
    assert settings.metrics_addr == environ["BACKEND_METRICS_ADDR"]
    assert settings.auth_token == environ["LOCALAI_GRPC_AUTH_TOKEN"]
    stop = float(read("vllm-backend.service")["Service"]["TimeoutStopSec"][0])
    assert settings.drain_seconds + settings.shutdown_timeout < stop


def test_the_follower_takes_its_command() -> None:
    args = follower(command("vllm-worker.service")[1:])
    assert (args.data_parallel_size, args.data_parallel_start_rank, args.tensor_parallel_size) == (4, 2, 4)
    # Draining and deregistering take up to a minute.
    assert float(read("vllm-worker.service")["Service"]["TimeoutStopSec"][0]) > 60


@pytest.mark.parametrize(("unit", "name"), UNITS.items())
def test_no_variable_is_unused(unit: str, name: str) -> None:
    docs = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (line,) = read(unit)["Service"]["ExecStart"]
    for variable in variables(name):
        ours = variable in ("LOCALAI_REGISTER_TO", "LOCALAI_REGISTRATION_TOKEN")
        assert variable in line or f"`{variable}`" in docs or ours
