"""What `run.sh --check` says of this machine and of models."""

import json
import shutil
from pathlib import Path

import pytest

from common import installation
from common.errors import LoadFailed
from common.gguf_plan import plan_gguf
from tests.models import ensure, gguf_files


def test_the_environment_has_what_vllm_reports() -> None:
    rows = dict(installation.environment())
    assert rows["vLLM"].startswith("0.32.")
    assert {"system", "torch", "CPU", "memory", "device", "environment for vLLM"} <= rows.keys()
    assert all(rows.values())


def test_a_model_as_it_would_be_loaded() -> None:
    rows = dict(installation.model(str(ensure("scripted"))))
    assert rows["architecture"].startswith("LlamaForCausalLM, generate")
    assert rows["context"] == "4096 tokens"
    assert "tool parser hermes" in rows["parsers"]
    assert "reasoning parser qwen3" in rows["parsers"]


def test_a_hub_id_is_not_fetched() -> None:
    (row,) = installation.model("org/no-such-model")
    assert row[0] == "model"
    assert "org/no-such-model, a hub id" in row[1]


def failing(name: str) -> str:
    with pytest.raises(LoadFailed) as caught:
        list(installation.model(name))
    assert str(caught.value).startswith(name)
    return str(caught.value)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    assert "has no config.json" in failing(str(tmp_path))
    assert "neither an existing folder nor a hub id" in failing("/no/such/folder")
    (tmp_path / "config.json").write_text("{")
    assert "JSON" in failing(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nothing", "architectures": ["NothingForCausalLM"]})
    )
    assert "nothing" in failing(str(tmp_path)).lower()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure("scripted"), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt"))
    assert "has no weights" in failing(str(folder))


def test_weights_that_no_memory_holds(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ensure("scripted"), folder)
    with (folder / "more.safetensors").open("wb") as file:
        file.write((2).to_bytes(8, "little") + b"{}")  # a file of no tensors
        file.truncate(2**43)  # 8 TiB, none of it on the disk
    assert "weights take 8192.0 GiB" in failing(str(folder))


def test_a_gguf_file_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    file = gguf_files.write(ensure("scripted"), tmp_path / "model.gguf")
    ((name, value),) = installation.model(str(file))
    assert name == "GGUF"
    assert value.startswith(f"{file}; LoadModel converts it, once, into {tmp_path}/cache/gguf/model-")
    assert value.endswith(": 2.3 MiB as float32")
    assert not (tmp_path / "cache").exists()
    # What was converted is looked at as any folder.
    plan = plan_gguf(str(file))
    shutil.copytree(ensure("scripted"), plan.folder)
    rows = dict(installation.model(str(file)))
    assert rows["GGUF"] == f"{file}, converted before"
    assert rows["architecture"].startswith("LlamaForCausalLM, generate")
