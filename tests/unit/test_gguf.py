"""The folder of a GGUF file: made once, by one process, and whole or not at all."""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from common import gguf, gguf_conversion
from common.engine_log import StageClock
from common.errors import LoadFailed
from common.gguf_plan import GGUFPlan, plan_gguf
from tests.models import ensure, gguf_files


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", "Q8_0")


def clock() -> StageClock:
    return StageClock(lambda _stage, _seconds: None)


def children() -> list[psutil.Process]:
    """Processes that convert; not the dead that tests of servers have left to this process, their last parent."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def left(root: Path) -> list[str]:
    """What lies in the cache besides locks."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


async def use(plan: GGUFPlan, seen: StageClock) -> bool:
    """Whether the folder is complete while it is in use."""
    async with gguf.in_place(plan, seen):
        return {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(plan.folder))


async def test_two_at_once_and_one_later(file: Path, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plan = plan_gguf(str(file))
    stages: list[str] = []
    clocks = [StageClock(lambda stage, _seconds: stages.append(stage)) for _ in range(2)]
    assert await asyncio.gather(*(use(plan, clock) for clock in clocks)) == [True, True]
    assert [stage for stage in stages if "importing transformers" in stage] == [
        "converting GGUF: importing transformers"
    ]
    assert left(root) == [Path(plan.folder).name]
    assert children() == []
    converted = [text for text in caplog.messages if "is converted, once, into" in text]
    assert converted == [f"load: {file} is converted, once, into {plan.folder}: 1.1 MiB as float16"] * 2
    made = os.stat(Path(plan.folder) / "config.json").st_mtime_ns
    assert await use(plan, clock())
    assert caplog.messages[-1] == f"load: {file} was converted before: {plan.folder}"
    assert os.stat(Path(plan.folder) / "config.json").st_mtime_ns == made


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # what is waited for is another process's
            await asyncio.sleep(0.02)


async def test_a_caller_who_goes_away(file: Path, root: Path) -> None:
    plan, seen = plan_gguf(str(file)), clock()
    task = asyncio.create_task(use(plan, seen))
    partial = gguf_conversion.beside(Path(plan.folder))[1]
    await until(partial.exists)
    assert not plan.made
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left(root) == []
    assert children() == []


async def test_a_conversion_that_is_killed(file: Path, root: Path) -> None:
    plan = plan_gguf(str(file))
    task = asyncio.create_task(use(plan, clock()))
    await until(gguf_conversion.beside(Path(plan.folder))[1].exists)
    (process,) = children()
    process.send_signal(signal.SIGKILL)
    with pytest.raises(LoadFailed, match=r"can't be converted: the process that did it ended with status -9, perhaps"):
        await task
    assert left(root) == []
    assert children() == []


async def test_what_a_killed_server_left_is_made_anew(file: Path) -> None:
    plan = plan_gguf(str(file))
    partial = gguf_conversion.beside(Path(plan.folder))[1]
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("half")
    assert await use(plan, clock())
    assert not partial.exists()
    assert (Path(plan.folder) / "config.json").read_text() != "half"


async def test_why_it_fails(tmp_path: Path, root: Path) -> None:
    lacking = {"blk.1.attn_q.weight": None}
    plan = plan_gguf(str(gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", tensors=lacking)))
    with pytest.raises(LoadFailed, match=r"model\.gguf can't be converted: it has no weights for model\.layers\.1\."):
        await use(plan, clock())
    assert left(root) == []


async def test_a_folder_that_can_not_be_made(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    plan = plan_gguf(str(file))
    with pytest.raises(LoadFailed, match=r"can't be converted: .*cache/gguf: Not a directory"):
        await use(plan, clock())


def pretended(root: Path, name: str, source: str) -> Path:
    """A folder that was made of the file `source`."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "source.json").write_text(f'{{"source": "{source}"}}')
    return folder


async def test_older_versions_go_unless_they_are_in_use(file: Path, root: Path) -> None:
    pretended(root, "older", str(file))
    used = pretended(root, "used", str(file))
    pretended(root, "stranger", "/another/model.gguf")
    held = os.open(used, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    for name in ("left", "going"):
        (root / f".{name}.partial").mkdir()
        (root / f".{name}.lock").touch()
    going = os.open(root / ".going.lock", os.O_RDONLY)
    fcntl.flock(going, fcntl.LOCK_EX)
    plan = plan_gguf(str(file))
    assert await use(plan, clock())
    os.close(held)
    os.close(going)
    assert set(left(root)) == {Path(plan.folder).name, "used", "stranger", ".going.partial"}


async def test_too_little_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "available_memory", lambda: 2**20)
    plan = plan_gguf(str(file))
    with pytest.raises(LoadFailed, match=r"model\.gguf takes 513\.1 MiB of memory to convert, 1\.0 MiB are free"):
        await use(plan, clock())
    assert not plan.made


async def test_no_file_no_work() -> None:
    async with gguf.in_place(None, clock()):
        assert children() == []
