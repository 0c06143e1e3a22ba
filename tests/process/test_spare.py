"""The process that imports vLLM with the server and becomes the first engine's."""

import json
import os
import tempfile
from pathlib import Path

import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.models.script import line
from tests.process.orchestrator import FREE_SECONDS, PROBE_SECONDS, Backend, eventually
from tests.process.test_lifecycle import plain
from tests.process.wire import PARSERS, model_options

REFUSED = "the spare process can't become the engine's"


def spare(backend: Backend) -> psutil.Process:
    """The process, which is there soon after the port."""
    process: psutil.Process
    (process,) = eventually(backend.spares, PROBE_SECONDS, "the spare process")
    return process


def test_waits_through_loads_that_fail_for_the_first_engine_and_becomes_no_other(
    scripted: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{broken")
    with Backend() as backend:
        backend.wait_for_health()
        waiting = spare(backend)
        assert not backend.load(model_options(tmp_path)).success
        assert backend.spares() == [waiting]
        assert backend.load(model_options(scripted, *PARSERS)).success
        assert backend.engine_cores() == [waiting]
        assert backend.spares() == []
        assert plain(backend) == line("plain").content
        # Its stderr is that of the load: the stages are read from there.
        assert "load: loading weights took" in backend.stderr
        assert "(EngineCore pid=" in backend.stderr
        assert backend.call("Free", pb.HealthMessage(), timeout=FREE_SECONDS).success
        assert backend.children() == []
        assert backend.load(model_options(scripted, *PARSERS)).success
        (engine,) = backend.engine_cores()
        assert engine != waiting
        assert plain(backend) == line("plain").content
        assert REFUSED not in backend.stderr


def test_threads_where_the_user_says_nothing(scripted: Path) -> None:
    """Each computes on a core of its own, and those that only talk are free."""
    cpus = os.sched_getaffinity(0)
    before = set(Path(tempfile.gettempdir()).glob("vllm_dist_*"))
    with Backend(env={"VLLM_CPU_OMP_THREADS_BIND": ""}) as backend:
        backend.wait_for_health()
        waiting = spare(backend)
        assert backend.load(model_options(scripted, *PARSERS)).success
        assert backend.engine_cores() == [waiting]
        assert plain(backend) == line("plain").content
        main = os.sched_getaffinity(waiting.pid)
        places = [os.sched_getaffinity(each.id) for each in waiting.threads()]
        assert len(main) == 1
        # The watch of the server, which began before OpenMP, and vLLM's two for its sockets at least.
        assert places.count(cpus) >= 3, places
        if len(cpus) < 8:
            assert {cpu for place in places if len(place) == 1 for cpu in place} == cpus
        # What ranks meet by: nobody would remove it.
        assert set(Path(tempfile.gettempdir()).glob("vllm_dist_*")) == before


def test_killed_before_it_is_needed(scripted: Path) -> None:
    with Backend() as backend:
        backend.wait_for_health()
        spare(backend).kill()
        assert backend.load(model_options(scripted, *PARSERS)).success
        assert plain(backend) == line("plain").content
        assert f"{REFUSED}: it is gone" in backend.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"distributed_executor_backend": "mp"}, "the engine has several processes"),
        ({"enforce_eager": False}, "TORCHDYNAMO_DISABLE"),
    ],
    ids=["several", "compiled"],
)
def test_ends_where_the_engine_wants_another_start(scripted: Path, arguments: dict[str, object], why: str) -> None:
    with Backend() as backend:
        backend.wait_for_health()
        waiting = spare(backend)
        assert backend.load(model_options(scripted, *PARSERS, EngineArgs=json.dumps(arguments))).success
        assert f"{REFUSED}: {why}\n" in backend.stderr
        assert not waiting.is_running()
        assert plain(backend) == line("plain").content


def test_ends_with_a_server_that_never_loads() -> None:
    with Backend() as backend:
        backend.wait_for_health()
        spare(backend)
        assert backend.stop().status == 0
        assert backend.left() == []
