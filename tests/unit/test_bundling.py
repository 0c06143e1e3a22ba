"""What a bundle leaves out, and how it is known that nothing asks for it."""

from pathlib import Path, PurePosixPath

import pytest

from bundling import headers, prune


def test_reasons() -> None:
    assert prune.reason(PurePosixPath("torch/bin/protoc"), "cpu") == "tests and protoc"
    assert prune.reason(PurePosixPath("torch/bin/torch_shm_manager"), "cpu") is None
    assert prune.reason(PurePosixPath("numpy/linalg/tests/test_linalg.py"), "cpu") == "tests"
    assert prune.reason(PurePosixPath("numpy/testing/__init__.py"), "cpu") is None
    assert prune.reason(PurePosixPath("torch-2.dist-info/licenses/test/LICENSE"), "cpu") is None
    assert prune.reason(PurePosixPath("triton/include/cuda.h"), "cpu") == "headers"
    assert prune.reason(PurePosixPath("triton/include/cuda.h"), "cuda13") is None
    assert prune.stdlib_reason(PurePosixPath("tkinter/ttk.py")) == "windows"
    assert prune.stdlib_reason(PurePosixPath("site-packages/x.dist-info/licenses/y")) is not None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import some.tests", True),
        ("def later():\n    from some.tests import helper", True),
        ("from .tests import helper", True),
        ("from . import tests", True),
        ("import some.tests.helper as helper", True),
        ("try:\n    import some.tests\nexcept ImportError:\n    pass", False),
        ("if TYPE_CHECKING:\n    import some.tests", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import some.tests", True),
        ("import other.tests", False),
        ("tests = 1", False),
    ],
)
def test_dangling_imports(source: str, found: bool, tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(source)
    gone = [PurePosixPath("some/tests/__init__.py"), PurePosixPath("some/tests/helper.py")]
    dangling = prune.dangling_imports([(PurePosixPath("some/module.py"), file)], gone)
    assert bool(dangling) == found
    assert all(each.module.startswith("some.tests") for each in dangling)


def test_a_package_stays_as_long_as_anything_in_it_does(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import some.tests")
    kept = [(PurePosixPath("some/module.py"), file), (PurePosixPath("some/tests/kept.py"), file)]
    assert prune.dangling_imports(kept, [PurePosixPath("some/tests/__init__.py")]) == []


def test_headers(tmp_path: Path) -> None:
    first, second, generator = (tmp_path / name for name in ("first", "second", "generator"))
    for folder in (first / "a", second, generator):
        folder.mkdir(parents=True)
    (first / "a/one.h").write_text('#pragma once\n#include "two.h"\n  #  include <three.h>\n#include <absent.h>\n')
    (first / "a/two.h").write_text("#ifdef NEVER\n#include_next <four.h>\n#endif\n")
    for name in ("three", "four", "five"):
        (second / f"{name}.h").write_text("#include <three.h>\n")
    (generator / "write.py").write_text('code = "#include <a/one.h>"\nother = f"#include <{device}.h>"\n')
    names = headers.named_in(generator)
    assert names == {"a/one.h"}
    reached = headers.reachable(names, [first, second])
    assert {path.name for path in reached} == {"one.h", "two.h", "three.h", "four.h"}
