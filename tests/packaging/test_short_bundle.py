"""A bundle, packed in short, moved and served: what `make test-bundle` proves in ten minutes, as far as one can do."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.models import ensure
from tests.models.script import line
from tests.packaging.machine import ROOT
from tests.process.orchestrator import ENGINE_ENVIRONMENT, Backend, free_port
from tests.process.wire import PARSERS, check_shape, content, model_options, predict_options

PORT_SECONDS = 30.0  # what the orchestrator gives it
ODD = "an odd place, näme & 'quote'"


def mapped(backend: Backend) -> set[str]:
    """The files that its processes have in memory."""
    maps = (Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8") for process in backend.processes())
    lines = [text for each in maps for text in each.splitlines()]
    return {text.split(maxsplit=5)[5].strip() for text in lines if "/" in text}


@pytest.mark.timeout(600)
def test_pack_move_serve(tmp_path: Path) -> None:
    started = time.monotonic()
    subprocess.run([ROOT / "package.sh", "--short", tmp_path / "packed"], check=True)
    packed = time.monotonic()
    moved = tmp_path / ODD
    (tmp_path / "packed").rename(moved)
    assert [path.name for path in tmp_path.iterdir()] == [ODD]
    addr = f"127.0.0.1:{free_port()}"
    # Neither PATH nor HOME, as little as make test-bundle has.
    environment = {"PATH": "", "TMPDIR": str(tmp_path)} | ENGINE_ENVIRONMENT
    argv = ["-i", *(f"{name}={value}" for name, value in environment.items()), str(moved / "run.sh"), "--addr", addr]
    with Backend(run_sh="/usr/bin/env", argv=argv, addr=addr, cwd=tmp_path) as backend:
        backend.wait_for_health(PORT_SECONDS)
        result = backend.load(model_options(ensure("scripted"), *PARSERS, DType="float32"))
        assert result.success, result.message
        for name in ("plain", "tool", "unicode"):
            replies = backend.stream(predict_options(line(name)))
            check_shape(replies)
            assert content(replies).strip() == line(name).answer.partition("<tool_call>")[0].strip()
        files = mapped(backend)
    print(f"packed in {packed - started:.1f} s, moved and served in {time.monotonic() - packed:.1f} s")
    assert [path for path in files if path.startswith(str(moved)) and "libtorch_cpu" in path]
    # Nothing is left that leads to where it was made.
    elsewhere = (sys.prefix, os.path.realpath(sys.prefix), *(str(ROOT / name) for name in ("backend", "common")))
    assert [path for path in files if path.startswith(elsewhere)] == []
    assert (moved / "common/pb").is_dir()
    assert not list(moved.rglob("site-packages/pytest*"))
