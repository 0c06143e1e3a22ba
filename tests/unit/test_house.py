"""The rules of the house, which no single test of a module would notice being broken."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("vllm", "torch", "transformers", "xgrammar", "numpy")
# What builds or ends an engine.
CONSTRUCTORS = ("AsyncLLM", "LLM", "LLMEngine")
FACTORIES = ("from_vllm_config", "from_engine_args")
# Which work for one request only.
REQUEST_ROOMS = (
    "embedding",
    "generation",
    "harmony",
    "media_prompt",
    "ranking",
    "scoring",
    "speech",
    "token_classification",
    "tokens",
)
# Who does which.
ENGINE_ROOMS = {"engine_start.py": {"from_vllm_config"}, "engine.py": {"shutdown"}}


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")


def nodes(path: Path) -> Iterator[ast.AST]:
    yield from ast.walk(ast.parse(path.read_text(encoding="utf-8"), path.name))


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports, at whatever place."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", sources("common"), ids=lambda path: path.name)
def test_common_never_imports_backend_or_grpc(path: Path) -> None:
    assert not imported(path) & {"backend", "grpc", "grpc_health", "grpc_reflection", "signal"}


@pytest.mark.parametrize("path", sources("backend"), ids=lambda path: path.name)
def test_backend_never_imports_vllm(path: Path) -> None:
    assert not imported(path) & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    [
        "backend.__main__",
        "backend.entry",
        "backend.server",
        "backend.lifecycle",
        "backend.servicer",
        "backend.chat",
        "backend.check",
        "backend.follower",
        "backend.forwarding",
        "backend.frontend",
        "backend.frontends",
        "backend.health",
        "backend.logs",
        "backend.metrics_port",
        "backend.plan",
        "backend.sockets",
        "backend.tls",
    ],
)
def test_what_runs_before_the_port_is_open_is_light(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(json.loads(done.stdout))
    assert module in loaded
    assert not loaded & {*HEAVY, "prometheus_client", "opentelemetry"}
    assert not [name for name in loaded if name.startswith("vllm.")]


@pytest.mark.parametrize("room", REQUEST_ROOMS)
def test_requests_leave_the_threads_of_asyncio_to_status_loads_and_the_end(room: str) -> None:
    asked = {node.attr for node in nodes(ROOT / "common" / f"{room}.py") if isinstance(node, ast.Attribute)}
    assert "to_thread" not in asked


@pytest.mark.parametrize("path", [*sources("common"), *sources("backend")], ids=lambda path: path.name)
def test_only_the_engine_rooms_build_and_end_engines(path: Path) -> None:
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and node.attr in FACTORIES:
            found.add(node.attr)
        if isinstance(node, ast.Attribute) and node.attr == "shutdown" and ast.unparse(node.value).endswith("llm"):
            found.add("shutdown")
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in CONSTRUCTORS:
            found.add("constructor")
    expected: dict[str, set[str]] = ENGINE_ROOMS if path.parent.name == "common" else {}
    assert found == expected.get(path.name, set())
