"""Nothing is installed in this room but by a uv that only writes down what it was asked."""

from pathlib import Path

import pytest

from tests.packaging.machine import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")
