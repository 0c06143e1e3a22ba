"""Libraries that engines are started with."""

import os
from pathlib import Path

import pytest

from common import preload, vllm_env
from common.preload import VARIABLE, libraries


@pytest.fixture
def installed(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders: the first has Intel's OpenMP, the second both, and the larger tcmalloc too."""
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
        (folder / "libiomp5.so").touch()
    for name in ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4"):
        (folders[1] / name).touch()
    return folders


def test_both_where_both_are(installed: tuple[Path, Path]) -> None:
    first, second = installed
    assert libraries({}, installed) == f"{second}/libtcmalloc_minimal.so.4:{first}/libiomp5.so"
    (second / "libtcmalloc_minimal.so.4").unlink()
    assert libraries({}, installed) == f"{second}/libtcmalloc.so.4:{first}/libiomp5.so"


def test_one_where_there_is_one(installed: tuple[Path, Path]) -> None:
    assert libraries({}, installed[:1]) == f"{installed[0]}/libiomp5.so"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ("mine.so", ["libtcmalloc_minimal.so.4", "libiomp5.so"]),
        ("libtcmalloc.so", ["libiomp5.so"]),
        ("libjemalloc.so", ["libiomp5.so"]),
        ("libgomp.so.1", ["libtcmalloc_minimal.so.4"]),
        ("libomp.so", ["libtcmalloc_minimal.so.4"]),
        ("libtcmalloc_minimal.so.4:libgomp.so.1", []),
    ],
)
def test_what_the_user_preloads_stays(given: str, added: list[str], installed: tuple[Path, Path]) -> None:
    said = libraries({VARIABLE: given}, installed)
    if not added:
        assert said is None
        return
    assert said
    assert said.startswith(f"{given}:")
    assert [Path(path).name for path in said.removeprefix(f"{given}:").split(":")] == added


def test_a_user_who_wants_none(installed: tuple[Path, Path]) -> None:
    assert libraries({VARIABLE: ""}, installed) is None


def test_nothing_is_there(tmp_path: Path) -> None:
    assert libraries({}, [tmp_path]) is None


def test_a_folder_that_the_variable_can_not_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    (folder / "libiomp5.so").touch()
    assert libraries({}, [folder]) is None


@pytest.mark.parametrize("for_cpus", [True, False])
def test_only_for_cpus(for_cpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(vllm_env, "is_for_cpus", lambda: for_cpus)
    monkeypatch.setattr(preload, "libraries", lambda _: "a.so")
    vllm_env.prepare_environment()
    assert (os.environ.get(VARIABLE) == "a.so") == for_cpus
    monkeypatch.delenv(VARIABLE, raising=False)
