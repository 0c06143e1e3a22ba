"""Defects to plant into a copy of the tree, and the tests that must catch them: the negative control.

A suite that passes with one of these in the server tests nothing. The product knows nothing of them: each is an edit
of a copy's source, which must find its place exactly once.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.process.orchestrator import REPOSITORY

_COPIED = (
    "backend",
    "common",
    "packaging",
    "proto",
    "tests",
    "run.sh",
    "install.sh",
    "Makefile",
    "pyproject.toml",
    "docs",
)
_LINKED = (".venv", ".models")
_SECONDS = 400.0


@dataclasses.dataclass(frozen=True)
class Net:
    """A test that must catch a defect.

    Attributes:
        test: as pytest is told; a file, or a test in it.
        words: a regular expression that its output matches when it is this defect that it has caught.
        engine: whether it starts one, which takes half a minute.

    """

    test: str
    words: str
    engine: bool = False
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Defect:
    """What is planted: in `file`, `before` becomes `after`; further edits in `more`."""

    name: str
    file: str
    before: str
    after: str
    nets: tuple[Net, ...]
    more: tuple[tuple[str, str, str], ...] = ()


CHAOS = "tests/chaos/test_chaos.py::test_clients_and_kills"
_SOAK = {"CHAOS_SECONDS": "60", "CHAOS_KILLS": "off"}
_SHORT = {"CHAOS_SECONDS": "10", "CHAOS_KILLS": "off"}


def _chaos(words: str, env: Mapping[str, str] = _SHORT) -> Net:
    return Net(CHAOS, words, engine=True, env=env)


DEFECTS = (
    Defect(
        "leak: each request keeps 100 kB",
        "common/vllm_errors.py",
        "    try:\n        llm.check_admission(requests)\n",
        '    kept = llm.__dict__.setdefault("kept", [])\n    kept.append(b"%9d" % len(kept) * 11_000)\n'
        "    try:\n        llm.check_admission(requests)\n",
        (_chaos(r"memory grew by", _SOAK),),
    ),
    Defect(
        "lost delta: the third chunk of each stream",
        "backend/servicer.py",
        "            async for reply in replies:\n                await context.write(reply)",
        "            number = 0\n            async for reply in replies:\n                number += 1\n"
        "                if number != 3:\n                    await context.write(reply)",
        (
            Net("tests/unit/test_server.py::test_answers", r"FAILED .*::test_answers - [Aa]ssert"),
            _chaos(r"was answered"),
        ),
    ),
    Defect(
        "authentication is skipped",
        "backend/interceptors.py",
        "return grpc.stream_stream_rpc_method_handler(_refuse)",
        "return await continuation(handler_call_details)",
        (Net("tests/unit/test_server.py::test_no_method_without_the_token", r"DID NOT RAISE"),),
    ),
    Defect(
        "orphaned engine: nobody watches the server",
        "common/orphan_watch.py",
        "    if not os.environ.get(VARIABLE):\n        return\n",
        "    return\n",
        (
            Net(
                "tests/process/test_orphans.py::test_server_that_is_killed_under_streams",
                r"left are|left behind",
                engine=True,
            ),
        ),
        more=(
            (
                "common/orphan_watch.py",
                '    server = os.environ.get(VARIABLE, "")\n    if not server or',
                '    server = ""\n    if not server or',
            ),
        ),
    ),
    Defect(
        "INTERNAL for a value that can't be used",
        "backend/errors.py",
        "(errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT)",
        "(errors.InvalidRequest, grpc.StatusCode.INTERNAL)",
        (Net("tests/unit/test_errors.py::test_status", r"INTERNAL"), _chaos(r"bad request: INTERNAL")),
    ),
    Defect(
        "a doubled character at the end of each chunk",
        "common/reply.py",
        "        part.content = content\n",
        "        part.content = content + content[-1]\n",
        (
            Net("tests/unit/test_reply.py::test_what_endpoints_put_together_is_the_same", r"AssertionError"),
            # What the two halves of a message say is compared before the answer is.
            _chaos(r"delta\.content == text"),
        ),
    ),
)


class NotPlanted(Exception):
    """The place that a defect is for is not there, or more than once."""


def copy_tree(folder: Path) -> None:
    """What the tests need of the tree, as a tree of its own in `folder`."""
    for name in _COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    for name in _LINKED:
        (folder / name).symlink_to((REPOSITORY / name).resolve())


def plant(defect: Defect, folder: Path) -> None:
    """Put the defect into the tree in `folder`; raises `NotPlanted`."""
    for file, before, after in ((defect.file, defect.before, defect.after), *defect.more):
        path = folder / file
        text = path.read_text(encoding="utf-8")
        if text.count(before) != 1:
            raise NotPlanted(f"{defect.name}: in {file} there are {text.count(before)} of {before!r}")
        path.write_text(text.replace(before, after), encoding="utf-8")
        compile(path.read_text(encoding="utf-8"), file, "exec")


def run(net: Net, folder: Path) -> tuple[int, str]:
    """pytest's exit status and output for the net, in the tree in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CHAOS_"))}
    # Python writes no bytecode: a file that is edited within its second would be taken for the old one.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": "", **net.env}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", net.test],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def caught(net: Net, status: int, output: str) -> bool:
    """Whether the net's test has failed, and for what was planted."""
    return status == 1 and re.search(net.words, output) is not None
