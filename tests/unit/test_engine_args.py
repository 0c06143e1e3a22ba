"""ModelOptions -> the plan of a load: what wins, what is understood, what is refused and with which hint."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.engine_args import LoadPlan, plan_load
from common.errors import BackendError, InvalidRequest
from common.pb import backend_pb2 as pb

HUB_ID = "Qwen/Qwen3-0.6B"
ALWAYS = {"model": HUB_ID, "served_model_name": HUB_ID, "structured_outputs_config": {"backend": "xgrammar"}}


def plan(**fields: Any) -> LoadPlan:
    return plan_load(pb.ModelOptions(**{"Model": HUB_ID} | fields))


def args(**fields: Any) -> dict[str, Any]:
    """The engine arguments that come of these fields alone."""
    bare, found = plan().engine_args, plan(**fields).engine_args
    assert bare.keys() <= found.keys()
    return {name: value for name, value in found.items() if name not in bare or value != bare[name]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model folder `org/model` in it, and files that are no models."""
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "org" / "model" / "config.json").write_text("{}")
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "params.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_text("weights")
    (tmp_path / "model.gguf").write_text("no GGUF file begins so")
    (tmp_path / "cut.gguf").write_text("GGUF")
    for name in ("a.gguf", "b.gguf", "mmproj-a.gguf"):
        (tmp_path / "empty" / name).write_text("GGUF")
    return tmp_path


def test_nothing_but_a_model() -> None:
    found = plan()
    assert found.model == HUB_ID
    assert found.engine_args.items() >= ALWAYS.items()
    assert found.tool_parser is None
    assert found.reasoning_parser is None


@pytest.mark.parametrize(
    ("fields", "model"),
    [
        ({"Model": "{}/org/model"}, "{}/org/model"),
        ({"Model": "org/model", "ModelPath": "{}"}, "{}/org/model"),
        ({"Model": "mistral", "ModelPath": "{}"}, "{}/mistral"),
        ({"Model": "org/model", "ModelFile": "{}/org/model"}, "{}/org/model"),
        ({"Model": "other/name", "ModelFile": "{}/org/model"}, "{}/org/model"),
        # The orchestrator always sets ModelFile; what it names may not exist.
        ({"Model": HUB_ID, "ModelFile": "{}/nowhere", "ModelPath": "{}"}, HUB_ID),
        ({"Model": f" {HUB_ID}\n"}, HUB_ID),
        ({"Model": "gpt2"}, "gpt2"),
        ({"Model": "org/model"}, "org/model"),
        ({"Model": "org/a.b-c_d"}, "org/a.b-c_d"),
    ],
)
def test_model(fields: dict[str, str], model: str, folder: Path) -> None:
    given: dict[str, Any] = {name: text.replace("{}", str(folder)) for name, text in fields.items()}
    found = plan_load(pb.ModelOptions(**given))
    assert found.model == found.engine_args["model"] == model.replace("{}", str(folder))
    assert found.engine_args["served_model_name"] == given["Model"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"Model": ""}, "empty"),
        ({"Model": " "}, "empty"),
        ({"Model": "{}/nowhere"}, "neither"),
        ({"Model": "../model"}, "neither"),
        ({"Model": "a/b/c"}, "neither"),
        ({"Model": "a b"}, "neither"),
        ({"Model": "a\0b"}, "neither"),
        ({"Model": "http://host/model"}, "neither"),
        ({"Model": "{}/empty"}, "has no config.json and several GGUF files; give one of a.gguf, b.gguf"),
        ({"Model": "{}/org"}, "config.json"),
        # A file of another backend, which the orchestrator tries every backend on.
        ({"Model": "{}/model.bin"}, "is a file; give a Hugging Face model folder, a GGUF file or a hub id"),
        ({"Model": "{}/model.gguf"}, "is a file"),
        ({"Model": "{}/cut.gguf"}, "cut.gguf is cut short"),
        ({"Model": "model.gguf", "ModelPath": "{}"}, "is a file"),
        ({"Model": "model", "ModelFile": "{}/model.gguf"}, "is a file"),
        pytest.param({"Model": "x" * 5000}, "", id="long"),
        pytest.param({"Model": "x", "ModelFile": "/" + "x" * 5000}, None, id="long file"),
        pytest.param({"Model": "x", "ModelPath": "x\0"}, None, id="NUL in the path"),
    ],
)
def test_a_model_that_is_none(fields: dict[str, str], reason: str | None, folder: Path) -> None:
    given: dict[str, Any] = {name: text.replace("{}", str(folder)) for name, text in fields.items()}
    if reason is None:
        assert plan_load(pb.ModelOptions(**given)).model == given["Model"]
        return
    with pytest.raises(InvalidRequest) as caught:
        plan_load(pb.ModelOptions(**given))
    assert caught.value.field == "Model"
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Quantization": "fp8"}, {"quantization": "fp8"}),
        ({"LoadFormat": "dummy"}, {"load_format": "dummy"}),
        ({"DType": "float16"}, {"dtype": "float16"}),
        ({"Tokenizer": "org/tokenizer"}, {"tokenizer": "org/tokenizer"}),
        ({"TrustRemoteCode": True}, {"trust_remote_code": True}),
        ({"EnforceEager": True}, {"enforce_eager": True}),
        ({"DisableLogStatus": True}, {"disable_log_stats": True}),
        ({"MaxModelLen": 128}, {"max_model_len": 128}),
        ({"TensorParallelSize": 2}, {"tensor_parallel_size": 2}),
        # 0.9 arrives as 0.8999999761581421.
        ({"GPUMemoryUtilization": 0.9}, {"gpu_memory_utilization": 0.9}),
        ({"GPUMemoryUtilization": 1.0}, {"gpu_memory_utilization": 1.0}),
        (
            {"LimitImagePerPrompt": 2, "LimitAudioPerPrompt": 1},
            {"limit_mm_per_prompt": {"image": 2, "audio": 1}},
        ),
        # Filled for every backend by the orchestrator.
        ({"ContextSize": 4096, "Seed": 5, "Threads": 8, "MMap": True, "F16Memory": True, "SwapSpace": 4}, {}),
    ],
)
def test_typed_field(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert args(**fields) == expected


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("DType", "float7", "float16"),
        ("MaxModelLen", -1, "1 or more"),
        ("TensorParallelSize", -1, "1 or more"),
        *(("GPUMemoryUtilization", value, "at most 1") for value in (-0.5, 1.5, 90, math.nan, math.inf)),
    ],
)
def test_a_typed_field_that_cannot_be_used(field: str, value: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(**{field: value})
    assert caught.value.field == field
    assert reason in str(caught.value)


@pytest.mark.parametrize("field", ["LimitImagePerPrompt", "LimitVideoPerPrompt", "LimitAudioPerPrompt"])
def test_a_limit_below_zero(field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        plan(**{field: -1})


@pytest.mark.parametrize("fields", [{"Embeddings": True}, {"Reranking": True}])
def test_a_model_that_is_to_pool(fields: dict[str, Any]) -> None:
    assert plan(**fields).engine_args["runner"] == "pooling"
    # The JSON has the last word, as always.
    assert plan(**fields, EngineArgs='{"runner": "auto"}').engine_args["runner"] == "auto"
    assert "runner" not in plan().engine_args


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        *(
            (entry, {"max_model_len": 128})
            for entry in (
                "--max-model-len:128",
                "--max-model-len=128",
                "--max-model-len 128",
                "--max-model-len: 128",
                " --max-model-len : 128 ",
                "--max_model_len:128",
            )
        ),
        ("--max-model-len:2k", {"max_model_len": 2000}),
        ("--enforce-eager", {"enforce_eager": True}),
        ("--enforce-eager:true", {"enforce_eager": True}),
        ("--enforce-eager:false", {"enforce_eager": False}),
        ("--enforce-eager=False", {"enforce_eager": False}),
        ("--no-enforce-eager", {"enforce_eager": False}),
        ("--no-enforce-eager:true", {"enforce_eager": False}),
        ("--no-enforce-eager:false", {"enforce_eager": True}),
        ("--disable-log-stats", {"disable_log_stats": True}),
        ("--seed:5", {"seed": 5}),
        ('--hf-overrides:{"a": 1}', {"hf_overrides": {"a": 1}}),
        ('--limit-mm-per-prompt={"image": 2}', {"limit_mm_per_prompt": {"image": 2}}),
        ("--logits-processors:a.b c.d", {"logits_processors": ["a.b", "c.d"]}),
        ("--tokenizer:https://host/x=y", {"tokenizer": "https://host/x=y"}),
        ("--tokenizer:a:b", {"tokenizer": "a:b"}),
    ],
)
def test_flag(entry: str, expected: dict[str, Any]) -> None:
    assert args(Options=[entry]) == expected


@pytest.mark.parametrize(
    ("entry", "hint"),
    [
        ("--max-model-lenn:1", "did you mean --max-model-len?"),
        ("--enforce-eagr", "did you mean --enforce-eager?"),
        ("--swap-space:4", "is not a flag"),
        ("--port:80", "is not a flag"),
        ("--help", "is not a flag"),
        ("--config:/etc/passwd", "is not a flag"),
        ("--max-model-len", "expected one argument"),
        ("--max-model-len:", "max-model-len"),
        ("--max-model-len:many", "many"),
        ("--enforce-eager:perhaps", "perhaps"),
        ("--dtype:float7", "float7"),
        ("--kv-transfer-config:{broken", "--kv-transfer-config"),
        ('--kv-transfer-config:{"kv_conector": "a"}', "kv_conector"),
        ('--compilation-config:{"mode": 9}', "--compilation-config"),
        ("--compilation-config:0", "--compilation-config"),
        ("tool-parser:hermes", "did you mean tool_parser?"),
        ("toolparser:hermes", "did you mean tool_parser?"),
        ("xyz", "use one of tool_parser, reasoning_parser"),
        ("-O3", "unknown"),
        ("", "key:value"),
        (":", "key:value"),
        ("=x", "key:value"),
    ],
)
def test_an_option_that_cannot_be_used(entry: str, hint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(Options=["tool_parser:hermes", entry])
    assert caught.value.field == "Options"
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_fetched_beside_the_model_are_no_options(folder: Path) -> None:
    entry = "draft_model:org/model"
    assert args(Options=[entry], ModelPath=str(folder)) == {}
    for path in ("", str(folder / "empty")):
        with pytest.raises(InvalidRequest, match="draft_model"):
            plan(Options=[entry], ModelPath=path)


@pytest.mark.parametrize("value", ["NaN", pytest.param("[" * 65 + "]" * 65, id="deep")])
def test_json_of_a_config_that_cannot_be_used(value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(Options=[f'--kv-transfer-config:{{"kv_connector_extra_config": {{"a": {value}}}}}'])
    assert caught.value.field == "Options['--kv-transfer-config']"


@pytest.mark.parametrize(
    ("options", "tool_parser", "reasoning_parser"),
    [
        ([], None, None),
        (["tool_parser:hermes"], "hermes", None),
        (["tool_parser=hermes"], "hermes", None),
        (["tool_parser:"], None, None),
        (["tool_parser"], None, None),
        (["reasoning_parser:"], None, None),
        (["--tool-parser:hermes"], "hermes", None),
        (["--tool_parser:hermes"], "hermes", None),
        (["--tool-call-parser=hermes"], "hermes", None),
        (["reasoning_parser:qwen3"], None, "qwen3"),
        (["--reasoning-parser:qwen3"], None, "qwen3"),
        (["tool_parser:a", "tool_parser:b"], "b", None),
        # The orchestrator appends its defaults without dashes: what the user wrote with dashes wins.
        (["--tool-parser:user", "tool_parser:default"], "user", None),
        (["--tool-call-parser:user", "tool_parser:default"], "user", None),
        (["--reasoning-parser:user", "reasoning_parser:default"], None, "user"),
        (["reasoning_parser:default", "--reasoning-parser:user"], None, "user"),
    ],
)
def test_parsers(options: list[str], tool_parser: str | None, reasoning_parser: str | None) -> None:
    found = plan(Options=options)
    assert (found.tool_parser, found.reasoning_parser) == (tool_parser, reasoning_parser)


def test_the_engine_args_know_the_reasoning_parser_best() -> None:
    found = plan(Options=["--reasoning-parser:user"], EngineArgs='{"reasoning_parser": "strict"}')
    assert found.reasoning_parser == "strict"
    assert "reasoning_parser" not in found.engine_args


@pytest.mark.parametrize("name", ["qwen3", None])
def test_the_engine_gets_the_reasoning_parser_that_was_chosen(name: str | None) -> None:
    # It keeps grammars out of thoughts.
    built = plan(Options=["reasoning_parser:other"]).build(name)
    assert (built.reasoning_parser or None) == name


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"MaxModelLen": 1, "Options": ["--max-model-len:2"], "EngineArgs": '{"max_model_len": 3}'}, 3),
        ({"MaxModelLen": 1, "Options": ["--max-model-len:2"]}, 2),
        ({"MaxModelLen": 1, "EngineArgs": '{"max_model_len": 3}'}, 3),
        ({"Options": ["--max-model-len:2", "--max-model-len:4"]}, 4),
        ({"MaxModelLen": 1, "EngineArgs": '{"max_model_len": null}'}, None),
    ],
)
def test_precedence(fields: dict[str, Any], expected: int | None) -> None:
    assert args(**fields) == {"max_model_len": expected}


def test_false_can_win() -> None:
    assert args(EnforceEager=True, EngineArgs='{"enforce_eager": false}') == {"enforce_eager": False}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" ", {}),
        ("{}", {}),
        # As the orchestrator adds them to every configuration.
        (
            '{"enable_prefix_caching": true, "enable_chunked_prefill": true}',
            {"enable_prefix_caching": True, "enable_chunked_prefill": True},
        ),
        ('{"max_model_len": "128"}', {"max_model_len": 128}),
        ('{"enforce_eager": "yes"}', {"enforce_eager": True}),
        ('{"kv_cache_memory_bytes": 1000}', {"kv_cache_memory_bytes": 1000}),
        ('{"limit_mm_per_prompt": {"image": 1}}', {"limit_mm_per_prompt": {"image": 1}}),
        ('{"hf_overrides": {"a": {"b": 1}}}', {"hf_overrides": {"a": {"b": 1}}}),
        (
            '{"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}',
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        ),
    ],
)
def test_engine_args(text: str, expected: dict[str, Any]) -> None:
    assert args(EngineArgs=text) == expected


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("{", "EngineArgs", "JSON"),
        ("[]", "EngineArgs", "object"),
        ("null", "EngineArgs", "object"),
        ('"x"', "EngineArgs", "object"),
        pytest.param("[" * 100_000, "EngineArgs", "deep", id="deep"),
        pytest.param('{"max_model_len": %s}' % ("9" * 5000), "EngineArgs", "JSON", id="huge"),
        ('{"max_modellen": 1}', "EngineArgs['max_modellen']", "did you mean max_model_len?"),
        ('{"max-model-len": 1}', "EngineArgs['max-model-len']", "did you mean max_model_len?"),
        ('{"swap_space": 4}', "EngineArgs['swap_space']", "is not an engine argument"),
        ('{"": 4}', "EngineArgs['']", "is not an engine argument"),
        ('{"_x": 4}', "EngineArgs['_x']", "is not an engine argument"),
        ('{"max_model_len": "many"}', "EngineArgs['max_model_len']", "many"),
        ('{"max_model_len": [1]}', "EngineArgs['max_model_len']", "[1]"),
        ('{"max_model_len": {}}', "EngineArgs['max_model_len']", "{}"),
        ('{"max_model_len": 1.5}', "EngineArgs['max_model_len']", "1.5"),
        ('{"dtype": null}', "EngineArgs['dtype']", "null"),
        ('{"dtype": "float7"}', "EngineArgs['dtype']", "float16"),
        ('{"enforce_eager": "perhaps"}', "EngineArgs['enforce_eager']", "perhaps"),
        ('{"compilation_config": {"nope": 1}}', "EngineArgs['compilation_config']", "nope"),
        ('{"gpu_memory_utilization": 1e999}', "EngineArgs", ""),
        ('{"gpu_memory_utilization": NaN}', "EngineArgs", ""),
    ],
)
def test_engine_args_that_cannot_be_used(text: str, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan(EngineArgs=text).build()
    assert caught.value.field.startswith(field)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "fields",
    [
        {"EngineArgs": '{"structured_outputs_config": {"backend": "guidance"}}'},
        {"EngineArgs": '{"structured_outputs_config": {"backend": "auto"}}'},
        {"Options": ['--structured-outputs-config:{"backend": "guidance"}']},
        {"Options": ["--structured-outputs-config.backend:guidance"]},
    ],
)
def test_structured_outputs_have_one_backend(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"xgrammar|not a flag"):
        plan(**fields)


def test_another_part_of_structured_outputs_leaves_the_backend() -> None:
    found = plan(EngineArgs='{"structured_outputs_config": {"disable_any_whitespace": true}}').build()
    assert found.structured_outputs_config.backend == "xgrammar"
    assert found.structured_outputs_config.disable_any_whitespace is True


def test_the_plan_names_the_model_that_is_loaded() -> None:
    for fields in ({"EngineArgs": '{"model": "other/name"}'}, {"Options": ["--model:other/name"]}):
        try:
            found = plan(**fields)
        except InvalidRequest:
            continue
        assert found.model == found.engine_args["model"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"Options": ["pooling:none"]}, {"runner": "pooling", "pooler_config": {"task": "token_embed"}}),
        # What is said in vLLM's own words wins.
        (
            {"Options": ["pooling:none"], "EngineArgs": '{"runner": "auto", "pooler_config": {"task": "embed"}}'},
            {"runner": "auto", "pooler_config": {"task": "embed"}},
        ),
        (
            {"Options": ["pooling:none"], "EngineArgs": '{"pooler_config": {"use_activation": false}}'},
            {"runner": "pooling", "pooler_config": {"use_activation": False, "task": "token_embed"}},
        ),
    ],
)
def test_no_pooling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert args(**fields) == expected
    assert plan(**fields).build().pooler_config.task == expected["pooler_config"]["task"]


def test_no_pooling_beside_vllms_flag() -> None:
    flag = '--pooler-config:{"use_activation": false}'
    config = plan(Options=["pooling:none", flag]).build().pooler_config
    assert (config.task, config.use_activation) == ("token_embed", False)
    assert plan(Options=[flag]).build().pooler_config.task is None


def test_another_pooling() -> None:
    with pytest.raises(InvalidRequest, match=r"Options: pooling:mean is unknown; use pooling:none, or vLLM's --pooler"):
        plan(Options=["pooling:mean"])


def test_what_vllm_writes_into_a_config_is_not_in_the_plan() -> None:
    fields: dict[str, Any] = {"Options": ['--pooler-config:{"task": "embed"}']}
    first = plan(**fields)
    first.build().pooler_config.seq_pooling_type = "LAST"
    assert first == plan(**fields)


def test_equal_options_make_equal_plans() -> None:
    fields: dict[str, Any] = {
        "MaxModelLen": 128,
        "Options": ["tool_parser:hermes", '--compilation-config:{"mode": 0}'],
        "EngineArgs": '{"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}',
    }
    assert plan(**fields) == plan(**fields)
    assert plan(**fields) != plan(**fields | {"MaxModelLen": 129})
    assert plan(**fields) != plan(**fields | {"Options": ["tool_parser:other"]})
    assert plan(ContextSize=4096, Seed=1) == plan(ContextSize=8192, Seed=2)


@pytest.mark.parametrize(
    "entry",
    [
        # vLLM gives each of these objects an id of its own.
        '--kv-transfer-config:{"kv_connector": "a", "kv_role": "kv_both"}',
        '--ec-transfer-config:{"ec_connector": "a", "ec_role": "ec_both"}',
        '--kv-events-config:{"enable_kv_cache_events": true}',
        '--compilation-config:{"mode": 0}',
        '--attention-config:{"backend": "CPU_ATTN"}',
        '--structured-outputs-config:{"backend": "xgrammar"}',
        "--profiler-config:{}",
    ],
)
def test_the_same_load_again_changes_nothing(entry: str) -> None:
    assert plan(Options=[entry]) == plan(Options=[entry])


def test_nothing_of_the_plan_is_in_vllms_configs() -> None:
    found = plan(Options=['--kv-transfer-config:{"kv_connector_extra_config": {"a": {}}}'])
    found.build().kv_transfer_config.kv_connector_extra_config["a"]["b"] = 1
    assert found.engine_args["kv_transfer_config"] == {"kv_connector_extra_config": {"a": {}}}


def test_vllm_takes_the_plan_and_leaves_it_as_it_is() -> None:
    fields = {"MaxModelLen": 128, "EngineArgs": '{"compilation_config": {"mode": 0}, "seed": 5}'}
    found = plan(**fields)
    built = found.build()
    assert (built.model, built.max_model_len, built.seed) == (HUB_ID, 128, 5)
    assert built.structured_outputs_config.backend == "xgrammar"
    assert found == plan(**fields)
    assert found.build().compilation_config is not built.compilation_config


TEXT = st.text(max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from(
    ["max_model_len", "dtype", "model", "compilation_config", "hf_overrides", "seed", "quantization", "load_format"]
) | st.sampled_from(["kv_transfer_config", "limit_mm_per_prompt", "logits_processors", "enforce_eager", "tokenizer"])
ENTRY = st.builds(
    lambda name, separator, value: f"{name}{separator}{value}",
    NAMES.map(lambda name: "--" + name.replace("_", "-")) | st.sampled_from(["tool_parser", "--no-enforce-eager"]),
    st.sampled_from([":", "=", " ", ""]),
    TEXT | VALUE.map(json.dumps),
)


@given(
    st.builds(
        pb.ModelOptions,
        Model=st.just(HUB_ID) | TEXT,
        ModelFile=TEXT,
        ModelPath=TEXT,
        DType=st.just("") | TEXT,
        Quantization=st.just("") | TEXT,
        MaxModelLen=st.integers(-(2**31), 2**31 - 1),
        GPUMemoryUtilization=st.just(0.0) | st.floats(width=32),
        Options=st.lists(ENTRY | TEXT, max_size=2),
        EngineArgs=st.just("") | TEXT | st.dictionaries(NAMES, VALUE, max_size=2).map(json.dumps),
    )
)
def test_any_options_are_understood_or_refused(options: pb.ModelOptions) -> None:
    try:
        plan_load(options).build()
    except BackendError as error:
        assert str(error)  # noqa: PT017  # nothing is expected in particular


FORCED = '{"enable_prefix_caching": true, "enable_chunked_prefill": true}'


@dataclasses.dataclass
class Kind:
    """What a plan asks of vLLM's ModelConfig."""

    is_prefix_caching_supported: bool = True
    is_chunked_prefill_supported: bool = True


@pytest.mark.parametrize(
    ("fields", "kind", "dropped"),
    [
        ({"EngineArgs": FORCED}, Kind(), set()),
        ({"EngineArgs": FORCED}, Kind(is_prefix_caching_supported=False), {"enable_prefix_caching"}),
        ({"EngineArgs": FORCED}, Kind(False, False), {"enable_prefix_caching", "enable_chunked_prefill"}),
        # What the user says in the options stays.
        (
            {"EngineArgs": FORCED, "Options": ["--enable-prefix-caching"]},
            Kind(False, False),
            {"enable_chunked_prefill"},
        ),
        ({"Options": ["--enable-prefix-caching", "--enable-chunked-prefill"]}, Kind(False, False), set()),
        ({"EngineArgs": '{"enable_prefix_caching": false}'}, Kind(False, False), set()),
    ],
)
def test_what_the_orchestrator_imposes_goes_where_it_does_not_fit(
    fields: dict[str, Any], kind: Kind, dropped: set[str]
) -> None:
    asked = plan(**fields)
    fitted = asked.fitted(cast("Any", kind))
    assert asked.engine_args.keys() - fitted.engine_args.keys() == dropped
    assert {name: asked.engine_args[name] for name in fitted.engine_args} == fitted.engine_args


def test_how_long_ranks_are_waited_for() -> None:
    assert [plan(Options=options).rank_timeout for options in ([], ["rank_timeout:0.5"])] == [600.0, 0.5]
    # It says nothing of the engine that there is then.
    assert plan(Options=["rank_timeout:5"]) == plan()
    for odd in ("0", "-1", "nan", "inf", "soon"):
        with pytest.raises(InvalidRequest, match=f"rank_timeout:{odd} .* seconds above 0"):
            plan(Options=[f"rank_timeout:{odd}"])


@pytest.mark.parametrize(
    ("topology", "named"),
    [
        ({"distributed_executor_backend": "external_launcher"}, "torchrun"),
        ({"nnodes": 2, "node_rank": 1}, "is a follower's"),
    ],
)
def test_a_topology_that_no_head_can_have(topology: dict[str, Any], named: str) -> None:
    for fields in (
        {"EngineArgs": json.dumps(topology)},
        {"Options": [f"--{name.replace('_', '-')}:{value}" for name, value in topology.items()]},
    ):
        with pytest.raises(InvalidRequest, match=named):
            plan(**fields)


def test_vllm_listens_on_the_address_of_a_name_and_followers_are_told_the_name() -> None:
    found = plan(EngineArgs='{"data_parallel_address": "localhost", "master_addr": "localhost"}')
    built = found.build()
    assert {built.data_parallel_address, built.master_addr} <= {"127.0.0.1", "::1"}
    assert found.shared_args(None)["data_parallel_address"] == "localhost"
    with pytest.raises(InvalidRequest, match="neither an address nor a known name"):
        plan(EngineArgs='{"master_addr": "nobody.invalid"}').build()


def test_ignore_seed() -> None:
    assert [plan(Options=options).ignore_seed for options in ([], ["ignore_seed:false"], ["ignore_seed:true"])] == [
        False,
        False,
        True,
    ]
    with pytest.raises(InvalidRequest, match="ignore_seed:true or ignore_seed:false"):
        plan(Options=["ignore_seed:yes"])


@pytest.mark.parametrize(
    "fields",
    [
        {"EngineArgs": '{"otlp_traces_endpoint": "http://collector:4317"}'},
        {"Options": ["--otlp-traces-endpoint:http://collector:4317"]},
    ],
)
def test_where_traces_go(fields: dict[str, Any]) -> None:
    assert plan().traces_endpoint is None
    assert plan(**fields).traces_endpoint == "http://collector:4317"
    # vLLM's engine would die of the first request.
    with pytest.raises(InvalidRequest, match="DisableLogStatus"):
        plan(**fields, DisableLogStatus=True)
