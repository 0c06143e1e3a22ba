"""The negative control: a server with a planted defect fails the test that is there for it.

Here the nets that need no engine; `make control` (CONTROL=all) tries all of them, and that they hold nothing against
the tree as it is.
"""

import os
import time
from pathlib import Path

import pytest

from tests.chaos.defects import DEFECTS, Defect, Net, NotPlanted, caught, copy_tree, plant, run

ALL = os.environ.get("CONTROL") == "all"
PAIRS = [(defect, net) for defect in DEFECTS for net in defect.nets if ALL or not net.engine]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir()
    copy_tree(folder)
    return folder


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("defect", "net"), PAIRS, ids=lambda value: getattr(value, "name", None) or value.test)
def test_a_defect_is_caught(tree: Path, defect: Defect, net: Net) -> None:
    plant(defect, tree)
    started = time.monotonic()
    status, output = run(net, tree)
    print(f"{defect.name}: caught by {net.test} in {time.monotonic() - started:.0f} s")
    assert caught(net, status, output), f"not caught, exit status {status}:\n{output[-6000:]}"


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "net",
    {(net.test, *net.env.items()): net for _, net in PAIRS}.values(),
    ids=lambda net: net.test,
)
def test_a_net_lets_a_sound_server_pass(tree: Path, net: Net) -> None:
    status, output = run(net, tree)
    assert status == 0, output[-6000:]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_every_defect_finds_its_place(tree: Path, defect: Defect) -> None:
    """Those too whose nets need an engine and are tried by `make control` alone."""
    plant(defect, tree)


def test_a_defect_that_finds_no_place_is_told(tree: Path) -> None:
    defect = Defect("nothing", "backend/servicer.py", "no such line", "", ())
    with pytest.raises(NotPlanted):
        plant(defect, tree)
