"""What the weights take, read from headers: of folders, and of a hub that is a server of our own."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from common.errors import InvalidRequest
from common.model_shape import ModelShape, shape_of
from common.weight_sizes import Tensor, Weights, read_weights, weights_of
from tests.models import ensure

ROOT = Path(__file__).parents[2]
DENSE = {"model_type": "llama", "num_hidden_layers": 2, "dtype": "bfloat16"}
SPARSE = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "dtype": "bfloat16"}
TENSORS = {
    "model.embed_tokens.weight": ("BF16", [100, 8]),
    "model.layers.0.mlp.gate_proj.weight": ("BF16", [8, 16]),
    "model.layers.1.mlp.experts.0.up_proj.weight": ("F32", [8, 8]),
    "model.layers.1.mlp.experts.0.up_proj.weight_scale": ("F32", []),
    "model.layers.1.mlp.shared_expert.up_proj.weight": ("BF16", [4, 4]),
    # A layer past the last one: it drafts tokens.
    "model.layers.2.mlp.gate_proj.weight": ("BF16", [999, 999]),
    "visual.layers.7.weight": ("BF16", [3, 3]),
    "lm_head.weight": ("BF16", [100, 8]),
}
SIZES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def count(shape: list[int]) -> int:
    found = 1
    for each in shape:
        found *= each
    return found


def safetensors(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A file of these tensors, all zero."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + count(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(offset)


def sharded(folder: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    names = list(tensors)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, inside in files.items():
        (folder / file).write_bytes(safetensors({name: tensors[name] for name in inside}))
    index = {
        "metadata": {"total_size": sum(count(shape) * SIZES[dtype] for dtype, shape in tensors.values())},
        "weight_map": {name: file for file, inside in files.items() for name in inside},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def shape(raw: dict[str, object]) -> ModelShape:
    return shape_of(raw)


FOUND = Weights(layers=(128 + 16) * 2, experts=(64 + 1) * 2, rest=(800 + 9 + 800) * 2)


def test_where_each_tensor_belongs(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(TENSORS))
    assert read_weights(str(tmp_path), shape(SPARSE)) == FOUND
    assert FOUND.total == FOUND.layers + FOUND.experts + FOUND.rest


def test_shards_and_a_copy_in_another_form(tmp_path: Path) -> None:
    sharded(tmp_path, TENSORS)
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors(TENSORS))
    assert read_weights(str(tmp_path), shape(SPARSE)) == FOUND


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors(TENSORS))
    found = read_weights(str(tmp_path), shape(DENSE))
    assert (found.layers, found.experts) == (FOUND.layers + FOUND.experts, 0)


@pytest.mark.parametrize(
    ("dtype", "stored", "raw", "size"),
    [
        ("", "BF16", DENSE, 20),
        ("", "F32", DENSE, 20),
        ("", "F32", DENSE | {"dtype": "float32"}, 20),
        ("float32", "BF16", DENSE, 40),
        ("float16", "F32", DENSE, 20),
        ("", "I64", DENSE, 80),
        # Quantized: as it is stored, scales in 32 bits too.
        ("", "F8_E4M3", DENSE | {"quantization_config": {"quant_method": "fp8"}}, 10),
        ("", "F32", DENSE | {"quantization_config": {"quant_method": "fp8"}}, 40),
    ],
)
def test_the_dtype_that_it_is_loaded_as(dtype: str, stored: str, raw: dict[str, object], size: int) -> None:
    width = {"BF16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1}[stored]
    tensor = Tensor("model.layers.0.weight", stored, 10, 10 * width)
    assert weights_of([tensor], shape(raw), dtype).layers == size


def test_an_index_without_its_files(tmp_path: Path) -> None:
    sharded(tmp_path, TENSORS)
    total = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())["metadata"]["total_size"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert read_weights(str(tmp_path), shape(SPARSE)) == Weights(layers=total, guessed=True)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-1.bin").write_bytes(bytes(1000))
    (tmp_path / "pytorch_model-2.bin").write_bytes(bytes(234))
    assert read_weights(str(tmp_path), shape(DENSE)) == Weights(layers=1234, guessed=True)


def test_a_real_model() -> None:
    folder = ensure("scripted")
    found = read_weights(str(folder), shape_of(json.loads((folder / "config.json").read_bytes())), "float32")
    assert found.total == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.05)
    assert found.layers > 0
    assert not found.experts


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("other.txt", b"", "the folder has none, nor model.safetensors.index.json"),
        ("model.safetensors", b"", "its weights can't be read"),
        ("model.safetensors", struct.pack("<Q", 10**12) + b"{}", "its weights can't be read"),
        ("model.safetensors", struct.pack("<Q", 2) + b"[]", "its weights can't be read"),
        ("model.safetensors.index.json", b"{", "its weights can't be read"),
        ("model.safetensors.index.json", b"{}", "its weights can't be read"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "b"}}', "its weights can't be read"),
        ("model.safetensors.index.json", b'{"weight_map": 7}', "its weights can't be read"),
        ("model.safetensors", struct.pack("<Q", 2) + b"{}", "its weights are empty"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "its weights are empty"),
    ],
)
def test_weights_that_cannot_be_read(tmp_path: Path, file: str, content: bytes, problem: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InvalidRequest, match=problem):
        read_weights(str(tmp_path), shape(DENSE))


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as reading a model's files takes."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        prefix = "/org/model/resolve/main/"
        path = self.folder / self.path.removeprefix(prefix)
        if not self.path.startswith(prefix) or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = path.read_bytes(), 200
        wanted = self.headers.get("Range")
        if wanted and body:
            first, last = (int(each) for each in wanted.removeprefix("bytes=").split("-"))
            content, status = content[first : last + 1], 206
        if body:
            self.asked.append(f"{path.name} {len(content)}")
        self.send_response(status)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(path.name.encode()).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A hub with one model, `org/model`: its address, its folder, and what was fetched."""
    folder = tmp_path / "hub"
    folder.mkdir()
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"folder": folder, "asked": asked})) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder, asked
        server.shutdown()
        thread.join()


def test_a_model_on_the_hub_is_not_fetched(hub: tuple[str, Path, list[str]], tmp_path: Path) -> None:
    address, folder, asked = hub
    (folder / "config.json").write_text(json.dumps(SPARSE), encoding="utf-8")
    large = TENSORS | {"model.layers.0.large": ("BF16", [1000, 1000])}
    sharded(folder, large)
    code = (
        "import dataclasses, json; from common.model_shape import *; from common.weight_sizes import *;"
        "found = read_weights('org/model', shape_of(read_config('org/model')));"
        "print(json.dumps(dataclasses.asdict(found)))"
    )
    environ = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=True, timeout=120
    )
    found = Weights(**json.loads(done.stdout.splitlines()[-1]))
    assert found == Weights(FOUND.layers + 2_000_000, FOUND.experts, FOUND.rest)
    assert any(name.startswith("model-00002-of-00002.safetensors") for name in asked)
    assert sum(int(each.split()[1]) for each in asked) < 500_000
