"""Where an engine's sockets are made, and that none of them stays."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.utils.network_utils import get_open_zmq_ipc_path

from common import private_folders
from common.engine_sockets import VARIABLE, made_in, make_folder
from common.errors import LoadFailed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, with a path short enough for sockets; `tmp_path`, where pytest's is, is made before."""
    folder = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.delenv(VARIABLE, raising=False)
    yield Path(folder)
    shutil.rmtree(folder)


def test_vllm_makes_them_there(temporary: Path) -> None:
    folder = make_folder()
    assert Path(folder).parent == temporary
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    with made_in(folder):
        assert get_open_zmq_ipc_path().startswith(f"ipc://{folder}/")
    assert VARIABLE not in os.environ
    (Path(folder) / "socket").touch()
    private_folders.remove(folder)
    assert list(temporary.iterdir()) == []


def test_below_the_folder_that_the_user_names(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = temporary / "named"
    named.mkdir()
    monkeypatch.setenv(VARIABLE, str(named))
    folder = make_folder()
    assert Path(folder).parent == named
    with made_in(folder):
        assert os.environ[VARIABLE] == folder
    assert os.environ[VARIABLE] == str(named)
    with made_in(None):
        assert os.environ[VARIABLE] == str(named)
    private_folders.remove(folder)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(LoadFailed, match=r"sockets can be made in .*missing: No such file"):
        make_folder()


@pytest.mark.parametrize(("length", "fits"), [(57, True), (58, False)])
@pytest.mark.parametrize("is_named", [True, False])
def test_a_path_that_leaves_no_room_for_it(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, length: int, fits: bool, is_named: bool
) -> None:
    """107 bytes, less those of `/zmq-` and eight letters, and of a slash and a UUID."""
    deep = temporary / ("d" * (length - len(str(temporary)) - 1))
    deep.mkdir()
    if is_named:
        monkeypatch.setenv(VARIABLE, str(deep))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(deep))
    if is_named and not fits:
        with pytest.raises(LoadFailed, match=f"in {VARIABLE}, {deep}: its path is too long .*; it may have 57 bytes"):
            make_folder()
    else:
        folder = make_folder()
        assert Path(folder).parent == (deep if fits else Path("/tmp"))
        with made_in(folder):
            assert (len(get_open_zmq_ipc_path().removeprefix("ipc://")) == 107) is fits
        private_folders.remove(folder)
        assert not Path(folder).exists()
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("end", ["", "; private_folders.remove_all(); os._exit(0)"])
def test_they_go_with_the_process_but_not_with_one_that_it_forks(temporary: Path, end: str) -> None:
    code = (
        "import os, sys; from common import private_folders; folder = private_folders.make('a-');"
        "child = os.fork() or sys.exit(); os.waitpid(child, 0); assert os.path.isdir(folder)"
    )
    subprocess.run(
        [sys.executable, "-c", code + end], cwd=ROOT, env=os.environ | {"TMPDIR": str(temporary)}, check=True
    )
    assert list(temporary.iterdir()) == []
