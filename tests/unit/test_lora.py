"""Which adapters a load takes, under which names, and what of them is refused before an engine is started."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from common.engine_args import plan_load
from common.engine_config import configure
from common.errors import InvalidRequest
from common.lora import Adapter, AdapterPlan, Adapters
from common.pb import backend_pb2 as pb
from tests.models import ensure

CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model `base`, and adapters `one` and `two` beside it."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    write(tmp_path / "one", CONFIG)
    write(tmp_path / "two", CONFIG | {"r": 20, "rank_pattern": {"q_proj": 40}})
    return tmp_path


def write(folder: Path, config: Any) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def plan(folder: Path, **fields: Any) -> AdapterPlan:
    return plan_load(pb.ModelOptions(Model=str(folder / "base"), **fields)).adapters


def test_none(folder: Path) -> None:
    assert plan(folder) == AdapterPlan()
    assert plan(folder).engine_args == {}


def test_one_is_the_default(folder: Path) -> None:
    one = Adapter("one", str(folder / "one"), rank=8)
    assert plan(folder, LoraAdapter=str(folder / "one")) == AdapterPlan((one,), "one")
    assert plan(folder, LoraAdapters=[str(folder / "one")]) == AdapterPlan((one,), "one")
    assert plan(folder, LoraAdapter=f"{folder / 'one'}/") == AdapterPlan((one,), "one")


def test_of_several_only_the_single_field_is_the_default(folder: Path) -> None:
    several = plan(folder, LoraAdapters=[str(folder / "one"), f"second={folder / 'two'}"])
    assert [adapter.name for adapter in several.adapters] == ["one", "second"]
    assert several.default == "none"
    with_default = plan(folder, LoraAdapter=str(folder / "two"), LoraAdapters=[str(folder / "one")])
    assert [adapter.name for adapter in with_default.adapters] == ["two", "one"]
    assert with_default.default == "two"


def test_a_path_may_be_relative_to_the_models_or_to_the_model(folder: Path) -> None:
    assert plan(folder, LoraAdapter="one", ModelPath=str(folder)).adapters[0].path == str(folder / "one")
    assert plan(folder, LoraAdapter="one").adapters[0].path == str(folder / "one")
    write(folder / "base" / "inside", CONFIG)
    assert plan(folder, LoraAdapter="inside").adapters[0].path == str(folder / "base" / "inside")


def test_the_engine_has_room_for_all(folder: Path) -> None:
    asked = pb.ModelOptions(Model=str(folder / "base"), LoraAdapters=["one", "two"])
    args = plan_load(asked).engine_args
    # One slot is for requests without an adapter. The highest rank of a module is 40, and vLLM knows 32 and 64.
    assert (args["enable_lora"], args["max_loras"], args["max_lora_rank"]) == (True, 3, 64)
    asked.EngineArgs = '{"max_loras": 4, "max_cpu_loras": 5, "max_lora_rank": 128}'
    args = plan_load(asked).engine_args
    assert (args["max_loras"], args["max_cpu_loras"], args["max_lora_rank"]) == (4, 5, 128)
    asked.EngineArgs = '{"max_loras": 2}'
    with pytest.raises(InvalidRequest, match="max_loras: use 3 or more"):
        plan_load(asked)


def test_scales(folder: Path) -> None:
    scaled = plan(folder, LoraAdapter="one", LoraScale=0.3, LoraAdapters=["two", "x=one"], LoraScales=[-2])
    assert [adapter.scale for adapter in scaled.adapters] == [0.3, -2.0, 1.0]


def test_a_scale_without_an_adapter_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert plan(folder, LoraScale=0.5) == AdapterPlan()
    assert "LoraScale" in caplog.text


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"LoraAdapter": "missing"}, "LoraAdapter", "missing"),
        ({"LoraAdapter": "/nowhere/at/all"}, "LoraAdapter", "neither a folder nor a hub id"),
        ({"LoraAdapter": "base"}, "LoraAdapter", "adapter_config.json"),
        ({"LoraAdapter": "none=one"}, "LoraAdapter", "name"),
        ({"LoraAdapters": ["=one"]}, "LoraAdapters[0]", "name"),
        ({"LoraAdapters": ["one", ""]}, "LoraAdapters[1]", "name"),
        ({"LoraAdapters": ["one", "one"]}, "LoraAdapters", "'one'"),
        ({"LoraAdapter": "one", "LoraAdapters": ["one=two"]}, "LoraAdapters", "'one'"),
        ({"LoraAdapters": ["one"], "LoraScales": [1, 2]}, "LoraScales", "2 numbers for 1"),
        ({"LoraScales": [1]}, "LoraScales", "1 numbers for 0"),
        ({"LoraAdapter": "one", "LoraScale": float("nan")}, "LoraScale", "nan"),
        ({"LoraAdapters": ["one"], "LoraScales": [float("inf")]}, "LoraScales[0]", "inf"),
    ],
)
def test_refused(folder: Path, fields: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(folder, **fields)
    assert caught.value.field == field
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"lora_alpha": 16, "target_modules": ["q_proj"]}, "r"),
        (CONFIG | {"use_dora": True}, "DoRA"),
        (CONFIG | {"r": 0}, "rank"),
        (CONFIG | {"r": 1024}, "1024"),
        (CONFIG | {"r": "eight"}, "'<=' not supported"),
        (CONFIG | {"bias": "all"}, "bias"),
        (CONFIG | {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ([], "no JSON object"),
    ],
)
def test_an_adapter_that_vllm_cannot_use(folder: Path, config: Any, reason: str) -> None:
    write(folder / "odd", config)
    with pytest.raises(InvalidRequest) as caught:
        plan(folder, LoraAdapter="odd")
    assert reason in str(caught.value)


def test_a_model_with_an_encoder_of_its_own(folder: Path) -> None:
    wire = pb.ModelOptions(Model=str(ensure("whisper")), DType="float32", LoraAdapter=str(folder / "one"))
    with pytest.raises(InvalidRequest, match=r"^LoraAdapter, .* WhisperForConditionalGeneration.*; merge"):
        configure(plan_load(wire))


def test_configuration_that_is_no_json(folder: Path) -> None:
    (folder / "one" / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidRequest, match="LoraAdapter"):
        plan(folder, LoraAdapter="one")


def test_pick(folder: Path) -> None:
    adapters = Adapters(plan(folder, LoraAdapter="one", LoraAdapters=["two"]))
    for asked, expected in (("", "one"), ("one", "one"), ("two", "two")):
        request = adapters.pick(asked)
        assert request is not None
        assert request.lora_name == expected
        assert request.lora_path == str(folder / expected)
    assert adapters.pick("none") is None
    with pytest.raises(InvalidRequest) as caught:
        adapters.pick("three")
    assert caught.value.field == 'Metadata["lora"]'
    assert "one, two, none for the base model" in str(caught.value)


def test_pick_without_adapters() -> None:
    adapters = Adapters(AdapterPlan())
    assert adapters.pick("") is None
    assert adapters.pick("none") is None
    with pytest.raises(InvalidRequest, match="none for the base model"):
        adapters.pick("one")
    adapters.close()


def test_a_scale_goes_into_alpha(folder: Path) -> None:
    write(folder / "odd", CONFIG | {"alpha_pattern": {"q_proj": 4}})
    adapters = Adapters(plan(folder, LoraAdapter="odd", LoraScale=0.5))
    request = adapters.pick("odd")
    assert request is not None
    scaled = Path(request.lora_path)
    config = json.loads((scaled / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"]) == (8, {"q_proj": 2})
    assert (scaled / "adapter_model.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / "odd" / "adapter_config.json").read_text())["lora_alpha"] == 16
    adapters.close()
    assert not scaled.exists()
    assert (folder / "odd" / "adapter_model.safetensors").exists()
