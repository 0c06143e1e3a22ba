"""From the spawn to the open port, the ways to fail before it, and the end of a server without a model."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from common.pb import backend_pb2 as pb
from tests.process.orchestrator import REPOSITORY, RUN_SH, STOP_SECONDS, Backend, eventually, free_port

# The port takes a moment, a refusal no more than that.
REFUSAL_SECONDS = 10.0


@pytest.fixture
def unused_port() -> int:
    return free_port()


@pytest.fixture
def short_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose name fits into a socket's 107 bytes."""
    folder = Path("/tmp") / f"run-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def has_ipv6() -> bool:
    try:
        free_port("::1")
    except OSError:
        return False
    return True


def copy_of_the_tree(folder: Path) -> Path:
    """run.sh and what it needs, in another place; returns the new run.sh."""
    folder.mkdir()
    shutil.copy(RUN_SH, folder)
    for package in ("backend", "common"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".venv").symlink_to(REPOSITORY / ".venv")
    return folder / RUN_SH.name


def refused(backend: Backend, *, status: int | None = None) -> list[str]:
    """The lines on stderr of a server that must not start."""
    with backend:
        exit_status = backend.wait_for_exit(REFUSAL_SECONDS)
        assert exit_status > 0
        assert status in (None, exit_status)
        assert backend.stdout == ""
        return backend.stderr.splitlines()


# Starting


def test_health_is_ok_within_the_deadline() -> None:
    with Backend() as backend:
        seconds = backend.wait_for_health()
        print(f"port open after {seconds:.2f} s")


def test_without_a_model_only_health_status_and_free_succeed() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        assert backend.status().state == pb.StatusResponse.UNINITIALIZED
        assert backend.status().memory.total > 0
        assert backend.call("Free", pb.HealthMessage()).success
        for rpc, request in (
            ("Predict", pb.PredictOptions(Prompt="a")),
            ("TokenizeString", pb.PredictOptions(Prompt="a")),
            ("Detokenize", pb.DetokenizeRequest(tokens=[1])),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                backend.call(rpc, request)
            assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert raised.value.details() == "model not loaded"


def test_addr_as_one_word(unused_port: int) -> None:
    addr = f"127.0.0.1:{unused_port}"
    with Backend(addr=addr, argv=[f"--addr={addr}"]) as backend:
        backend.wait_for_health()


def test_all_interfaces(unused_port: int) -> None:
    with Backend(addr=f"127.0.0.1:{unused_port}", argv=["--addr", f"0.0.0.0:{unused_port}"]) as backend:
        backend.wait_for_health()


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6() -> None:
    with Backend(addr=f"[::1]:{free_port('::1')}") as backend:
        backend.wait_for_health()


def test_unix_socket(short_path: Path) -> None:
    with Backend(addr=f"unix:{short_path / 'socket'}") as backend:
        backend.wait_for_health()


def test_unix_socket_that_a_killed_server_left_behind(short_path: Path) -> None:
    addr = f"unix:{short_path / 'socket'}"
    with Backend(addr=addr) as backend:
        backend.wait_for_health()
        backend.signal_group(signal.SIGKILL)
        backend.wait_for_exit(STOP_SECONDS)
    assert (short_path / "socket").is_socket()
    with Backend(addr=addr) as backend:
        backend.wait_for_health()


def test_working_directory_elsewhere(tmp_path: Path) -> None:
    # Modules that shadow ours, or Python's, must stay out of sight.
    for module in ("backend", "common", "grpc", "asyncio"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('the working directory is in sys.path')\n")
    with Backend(cwd=tmp_path) as backend:
        backend.wait_for_health()


def test_through_a_relative_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to(RUN_SH)
    (tmp_path / "run.sh").symlink_to("first")
    with Backend(run_sh=tmp_path / "run.sh", cwd=tmp_path) as backend:
        backend.wait_for_health()


def test_copy_of_the_tree_in_a_folder_with_a_space(tmp_path: Path) -> None:
    run_sh = copy_of_the_tree(tmp_path / "a folder, a space")
    with Backend(run_sh=run_sh) as backend:
        backend.wait_for_health()
        # vLLM is found from there as well.
        eventually(lambda: "vLLM imported" in backend.stderr, 60, "the import of vLLM")
        assert backend.stdout == ""


def test_through_a_path_relative_to_the_working_directory() -> None:
    with Backend(run_sh="./run.sh", cwd=REPOSITORY) as backend:
        backend.wait_for_health()


def test_descriptor_0_is_dev_null() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        assert os.readlink(f"/proc/{backend.pid}/fd/0") == "/dev/null"


# Failing to start: the last line on stderr is what the orchestrator reports


def test_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (line,) = refused(Backend(addr=f"127.0.0.1:{port}"))
    assert f"127.0.0.1:{port}" in line
    assert "Address already in use" in line


def test_port_of_another_server() -> None:
    with Backend() as first:
        first.wait_for_health()
        (line,) = refused(Backend(addr=first.addr))
        assert "Address already in use" in line
        first.wait_for_health()


def test_socket_of_another_server(short_path: Path) -> None:
    addr = f"unix:{short_path / 'socket'}"
    with Backend(addr=addr) as first:
        first.wait_for_health()
        (line,) = refused(Backend(addr=addr))
        assert "Address already in use" in line
        first.wait_for_health(60)


@pytest.mark.parametrize(
    "addr",
    ["", "127.0.0.1", ":50051", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:65536", "127.0.0.1:-1", "unix:"],
)
def test_address_that_is_none(addr: str) -> None:
    (line,) = refused(Backend(addr=addr), status=2)
    assert line.startswith("backend: --addr")
    assert addr in line


def test_address_of_another_machine() -> None:
    addr = f"192.0.2.123:{free_port()}"
    (line,) = refused(Backend(addr=addr))
    assert addr in line
    assert "Cannot assign requested address" in line


def test_host_that_does_not_exist() -> None:
    (line,) = refused(Backend(addr="no-such-host.invalid:50051"))
    assert "no-such-host.invalid:50051" in line


def test_unix_socket_in_a_missing_folder(tmp_path: Path) -> None:
    (line,) = refused(Backend(addr=f"unix:{tmp_path}/missing/socket"))
    assert f"{tmp_path}/missing" in line


def test_unix_socket_in_a_folder_that_takes_none() -> None:
    # Not even root can make a file there.
    (line,) = refused(Backend(addr="unix:/proc/self/socket"))
    assert "unix:/proc/self/socket" in line


def test_unix_socket_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = refused(Backend(addr=f"unix:{tmp_path}/file/socket"))
    assert f"{tmp_path}/file" in line


def test_unix_socket_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (line,) = refused(Backend(addr=f"unix:{tmp_path}/precious"))
    assert "precious" in line
    assert (tmp_path / "precious").read_text() == "text"


def test_unix_socket_with_a_name_too_long(tmp_path: Path) -> None:
    (line,) = refused(Backend(addr=f"unix:{tmp_path}/{'x' * 108}"))
    assert "107" in line or "too long" in line


def test_unix_socket_in_the_place_of_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    (line,) = refused(Backend(addr=f"unix:{tmp_path}/link"))
    assert "Address already in use" in line or "link" in line.partition(f"{tmp_path}/link")[2]


@pytest.mark.parametrize("flag", ["--adr", "--no-such-flag"])
def test_unknown_flag(flag: str) -> None:
    addr = f"127.0.0.1:{free_port()}"
    lines = refused(Backend(addr=addr, argv=["--addr", addr, flag, "1"]), status=2)
    assert flag in lines[-1]


def test_no_address() -> None:
    lines = refused(Backend(argv=[]), status=2)
    assert "--addr" in lines[-1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKEND_LOG_LEVEL", "loud"),
        ("BACKEND_MAX_MESSAGE_MIB", "0"),
        ("BACKEND_SHUTDOWN_TIMEOUT", "nan"),
    ],
)
def test_environment_variable_that_cannot_be_used(name: str, value: str) -> None:
    (line,) = refused(Backend(env={name: value}), status=2)
    assert value in line


def test_no_usable_temporary_folder() -> None:
    # A limit of 0 on the size of files: folders are there, but none takes a byte. Pipes have no such limit.
    result = subprocess.run(
        ["bash", "-c", 'ulimit -f 0; exec "$@" <&-', "spawn", RUN_SH, "--addr", f"127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=REFUSAL_SECONDS,
        check=False,
    )
    assert result.returncode > 0
    (line,) = result.stderr.splitlines()
    assert "temporary directory" in line


def test_nothing_is_installed(tmp_path: Path) -> None:
    run_sh = copy_of_the_tree(tmp_path / "tree")
    (tmp_path / "tree" / ".venv").unlink()
    (line,) = refused(Backend(run_sh=run_sh))
    assert "install.sh" in line


def test_not_all_is_installed(tmp_path: Path) -> None:
    run_sh = copy_of_the_tree(tmp_path / "tree")
    environment = tmp_path / "tree" / ".venv"
    whole = environment.readlink()
    environment.unlink()
    environment.mkdir()
    (environment / "bin").symlink_to(whole / "bin")
    (line,) = refused(Backend(run_sh=run_sh))
    assert "install.sh" in line


def test_stubs_are_missing(tmp_path: Path) -> None:
    run_sh = copy_of_the_tree(tmp_path / "tree")
    shutil.rmtree(tmp_path / "tree" / "common" / "pb")
    (line,) = refused(Backend(run_sh=run_sh))
    assert "install.sh" in line


def test_vllm_that_cannot_be_imported_is_the_answer_to_a_load(tmp_path: Path, scripted: Path) -> None:
    # PYTHONPATH goes before the site-packages, as a broken installation would show.
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(
        "raise ImportError('libcuda.so.1: cannot open shared object file')\n"
    )
    with Backend(env={"PYTHONPATH": str(tmp_path)}) as backend:
        backend.wait_for_health()
        result = backend.load(pb.ModelOptions(Model=str(scripted)))
        assert not result.success
        assert "libcuda.so.1: cannot open shared object file" in result.message
        backend.wait_for_health(60)
        assert backend.stop().status == 0


# Ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_once_the_port_is_open(number: signal.Signals) -> None:
    with Backend() as backend:
        backend.wait_for_health()
        backend.signal_group(number)
        assert backend.wait_for_exit(STOP_SECONDS) == 0


def test_sigterm_during_the_import_of_vllm() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        # torch is what the import spends its time on.
        eventually(lambda: "libtorch" in Path(f"/proc/{backend.pid}/maps").read_text(), 60, "torch being imported")
        assert "vLLM imported" not in backend.stderr
        stop = backend.stop()
        assert stop.status == 0
        assert not stop.killed


def test_sigterm_before_the_port_is_open() -> None:
    with Backend() as backend:
        stop = backend.stop()
        # Python may not have run a line of ours yet.
        assert stop.status in (0, -signal.SIGTERM)


def test_second_sigterm_changes_nothing() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        backend.signal_group(signal.SIGTERM)
        backend.signal_group(signal.SIGTERM)
        assert backend.wait_for_exit(STOP_SECONDS) == 0


def test_sigkill_leaves_nothing() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        backend.signal_group(signal.SIGKILL)
        assert backend.wait_for_exit(STOP_SECONDS) == -signal.SIGKILL


def test_stop_frees_the_port_for_the_next() -> None:
    with Backend() as first:
        first.wait_for_health()
        assert first.stop().status == 0
        with Backend(addr=first.addr) as second:
            second.wait_for_health()


def test_python_is_the_process_that_was_spawned() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        executable = Path(os.readlink(f"/proc/{backend.pid}/exe"))
        assert executable.name.startswith("python")
        assert sys.version_info[:2] >= (3, 11)
        assert backend.engine_processes() == []
