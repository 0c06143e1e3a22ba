"""Which GGUF files are served, in which form, and out of which folder."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from vllm import envs
from vllm.platforms import current_platform

from common import gguf_plan
from common.engine_args import plan_load
from common.errors import InvalidRequest, LoadFailed
from common.gguf_plan import plan_gguf
from common.pb import backend_pb2 as pb
from tests.models import ensure, gguf_files


class Usage(NamedTuple):
    """What `shutil.disk_usage` says."""

    free: int


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(ensure("scripted"), tmp_path_factory.mktemp("gguf") / "a model.gguf", "Q8_0")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    assert str(tmp_path / "cache") == envs.VLLM_CACHE_ROOT
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and vLLM's plugin, neither of which is here."""
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda _self: True)
    monkeypatch.setattr(gguf_plan, "PLUGIN", "json")


def test_a_file_as_a_model(file: Path, root: Path) -> None:
    plan = plan_load(pb.ModelOptions(Model=file.name, ModelPath=str(file.parent), MaxModelLen=64))
    found = plan.gguf
    assert found is not None
    assert (found.source, found.native, found.stored_as) == (str(file), False, "float16")
    assert Path(found.folder).parent == root
    assert Path(found.folder).name.startswith("a-model-")
    assert found.size == 2 * sum(array.size for array in _weights())
    assert plan.model == found.folder
    assert plan.engine_args["served_model_name"] == file.name
    assert not {"quantization", "load_format", "model_weights"} & plan.engine_args.keys()
    assert not found.made
    os.makedirs(found.folder)
    assert found.made


def _weights() -> list[Any]:
    from safetensors.numpy import load_file

    return list(load_file(ensure("scripted") / "model.safetensors").values())


@pytest.mark.parametrize("named", ["file", "folder", "link"])
def test_where_it_lies(named: str, file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    path = {"file": file, "folder": file.parent, "link": link}[named]
    plan = plan_load(pb.ModelOptions(Model="org/name", ModelFile=str(path)))
    assert plan.gguf is not None
    assert os.path.samefile(plan.gguf.source, file)


def test_the_same_file_has_one_folder_and_a_changed_one_another(file: Path) -> None:
    first = plan_gguf(str(file))
    assert plan_gguf(str(file)) == first
    assert plan_gguf(os.path.join(file.parent, ".", file.name)).folder == first.folder
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert plan_gguf(str(file)).folder != first.folder
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert plan_gguf(str(file)).folder == first.folder


@pytest.mark.parametrize("fields", [{"Quantization": "gguf"}, {"LoadFormat": "gguf"}])
def test_what_vllms_documentation_says_to_set_is_dropped(fields: dict[str, Any], file: Path) -> None:
    plan = plan_load(pb.ModelOptions(Model=str(file), **fields))
    assert not {"quantization", "load_format"} & plan.engine_args.keys()


def test_with_vllms_plugin(file: Path, gpu: None) -> None:
    plan = plan_load(pb.ModelOptions(Model=str(file)))
    assert plan.gguf is not None
    assert plan.gguf.native
    assert plan.gguf.size == 0
    expected = {"model_weights": str(file), "quantization": "gguf", "load_format": "gguf", "model": plan.gguf.folder}
    assert plan.engine_args.items() >= expected.items()
    converted = plan_load(pb.ModelOptions(Model=str(file), Options=["gguf:convert"]))
    assert converted.gguf is not None
    assert not converted.gguf.native
    assert converted.model != plan.model


@pytest.mark.parametrize(("kind", "form", "native"), [("F16", "", False), ("F16", "native", True), ("Q4_0", "", True)])
def test_plain_floats_are_no_matter_for_the_plugin(
    kind: str, form: str, native: bool, tmp_path: Path, gpu: None
) -> None:
    file = gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", kind)
    assert plan_gguf(str(file), form).native == native


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["gguf:native"], "Options: gguf:native needs an NVIDIA or AMD GPU and the package vllm-gguf-plugin"),
        (["gguf:maybe"], "Options: gguf:maybe is unknown; use gguf:convert or gguf:native"),
    ],
)
def test_a_form_that_is_not_possible(options: list[str], reason: str, file: Path) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        plan_load(pb.ModelOptions(Model=str(file), Options=options))


def test_the_form_of_what_is_no_file() -> None:
    with pytest.raises(InvalidRequest, match="gguf:convert is for GGUF files"):
        plan_load(pb.ModelOptions(Model="org/name", Options=["gguf:convert"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "bert"}, "has the architecture 'bert'; GGUF can be served with bloom, falcon, "),
        ({"architecture": "clip"}, "is a projector for images or audio; give the file of the language model"),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts; join them"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"metadata": {"tokenizer.ggml.model": "rwkv"}}, "has a tokenizer of type 'rwkv', and gemma4, gpt2, "),
        ({"metadata": {"tokenizer.ggml.model": None}}, "has no tokenizer, and gemma4, gpt2, llama, t5 can be"),
    ],
)
def test_what_can_not_be_served(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", **changes)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        plan_gguf(str(file))
    assert caught.value.field == "Model"
    assert str(file) in str(caught.value)


def test_another_tokenizer_than_the_files(tmp_path: Path) -> None:
    file = gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", metadata={"tokenizer.ggml.model": "rwkv"})
    plan = plan_load(pb.ModelOptions(Model=str(file), Tokenizer=str(ensure("scripted"))))
    assert plan.gguf is not None


def test_only_a_vocabulary(tmp_path: Path) -> None:
    nothing = dict.fromkeys(_names())
    file = gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", tensors=nothing)
    with pytest.raises(InvalidRequest, match="has no weights, only a vocabulary"):
        plan_gguf(str(file))


def _names() -> list[str]:
    from gguf import GGUFReader

    written = gguf_files.write(ensure("scripted"), Path(envs.VLLM_CACHE_ROOT).parent / "whole.gguf")
    return [tensor.name for tensor in GGUFReader(written).tensors]


def test_weights_that_nobody_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_files.write(ensure("scripted"), tmp_path / "model.gguf", "Q8_0")
    monkeypatch.setattr("gguf.dequantize", _never)
    with pytest.raises(InvalidRequest, match="has weights of type Q8_0, which can't be decoded"):
        plan_gguf(str(file))


def _never(data: np.ndarray[Any, Any], kind: Any) -> Any:
    raise NotImplementedError


def test_too_little_disk(file: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(free: int) -> Callable[[Path], Usage]:
        def answer(place: Path) -> Usage:
            asked.append(place)
            return Usage(free)

        return answer

    monkeypatch.setattr("shutil.disk_usage", usage(2**20))
    with pytest.raises(LoadFailed, match=r"65\.1 MiB when converted, and .*/gguf has 1\.0 MiB free; VLLM_CACHE_ROOT"):
        plan_gguf(str(file))
    assert root.is_relative_to(asked[0])
    monkeypatch.setattr("shutil.disk_usage", usage(2**30))
    made = plan_gguf(str(file))
    os.makedirs(made.folder)
    # What is there needs no room.
    monkeypatch.setattr("shutil.disk_usage", usage(0))
    assert plan_gguf(str(file)) == made
