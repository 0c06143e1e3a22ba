"""Every field that holds JSON, nested deeper than anyone means it: a refusal that names the field, and no recursion."""

import json
from collections.abc import Callable

import pytest

from common.engine_args import plan_load
from common.errors import InvalidRequest
from common.pb import backend_pb2 as pb
from common.request import generation_request

DEPTHS = [70, 500, 100_000]
USER = pb.Message(role="user", content="hi")
MODEL = "org/model"


def objects(depth: int, key: str = "a") -> str:
    return f'{{"{key}":' * depth + "1" + "}" * depth


def arrays(depth: int) -> str:
    return "[" * depth + "]" * depth


def schema(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


def tool(parameters: str) -> str:
    return f'[{{"type":"function","function":{{"name":"f","parameters":{parameters}}}}}]'


def chat(**fields: object) -> pb.PredictOptions:
    return pb.PredictOptions(UseTokenizerTemplate=True, Messages=[USER], **fields)  # type: ignore[arg-type]


def with_calls(text: str) -> pb.PredictOptions:
    call = pb.Message(role="assistant", tool_calls=text)
    return pb.PredictOptions(UseTokenizerTemplate=True, Messages=[USER, call])


PREDICT: list[tuple[str, str, Callable[[int], pb.PredictOptions]]] = [
    ("Tools", "arrays", lambda n: chat(Tools=arrays(n))),
    ("Tools", "parameters", lambda n: chat(Tools=tool(schema(n)))),
    ("Tools", "parameters, required", lambda n: chat(Tools=tool(schema(n)), ToolChoice="required")),
    ("ToolChoice", "objects", lambda n: chat(ToolChoice=objects(n))),
    ("ToolChoice", "encoded twice", lambda n: chat(ToolChoice=json.dumps(objects(n)))),
    ("LogitBias", "objects", lambda n: chat(LogitBias=objects(n, "5"))),
    ("Grammar", "schema", lambda n: chat(Grammar=schema(n))),
    ('Metadata["json_schema"]', "schema", lambda n: chat(Metadata={"json_schema": schema(n)})),
    ('Metadata["json_schema"]', "arrays", lambda n: chat(Metadata={"json_schema": arrays(n)})),
    ('Metadata["response_format"]', "objects", lambda n: chat(Metadata={"response_format": objects(n)})),
    (
        'Metadata["response_format"]',
        "schema",
        lambda n: chat(
            Metadata={"response_format": f'{{"type":"json_schema","json_schema":{{"schema":{schema(n)}}}}}'}
        ),
    ),
    (
        'Metadata["chat_template_kwargs"]',
        "objects",
        lambda n: chat(Metadata={"chat_template_kwargs": objects(n)}),
    ),
    ("Messages[1].tool_calls", "arrays", lambda n: with_calls(arrays(n))),
    (
        "Messages[1].tool_calls",
        "arguments",
        lambda n: with_calls(f'[{{"function":{{"name":"f","arguments":{objects(n)}}}}}]'),
    ),
    (
        "Messages[1].tool_calls[0].function.arguments",
        "a string",
        lambda n: with_calls(json.dumps([{"function": {"name": "f", "arguments": objects(n)}}])),
    ),
]
LOAD: list[tuple[str, str, Callable[[int], pb.ModelOptions]]] = [
    ("EngineArgs", "objects", lambda n: pb.ModelOptions(Model=MODEL, EngineArgs=objects(n))),
    ("EngineArgs", "overrides", lambda n: pb.ModelOptions(Model=MODEL, EngineArgs=f'{{"hf_overrides":{objects(n)}}}')),
    (
        "EngineArgs",
        "config",
        lambda n: pb.ModelOptions(Model=MODEL, EngineArgs=f'{{"kv_transfer_config":{arrays(n)}}}'),
    ),
    ("Options", "overrides", lambda n: pb.ModelOptions(Model=MODEL, Options=[f"--hf-overrides:{objects(n)}"])),
    ("Options", "limits", lambda n: pb.ModelOptions(Model=MODEL, Options=[f"--limit-mm-per-prompt={objects(n)}"])),
]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("field", "make"), [(c[0], c[2]) for c in PREDICT], ids=[f"{c[0]} {c[1]}" for c in PREDICT])
def test_predict(field: str, make: Callable[[int], pb.PredictOptions], depth: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generation_request(make(depth), stream=False, has_tool_parser=True)
    assert caught.value.field == field
    if field != "ToolChoice":  # says what is allowed instead
        assert "nested too deep" in str(caught.value)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("field", "make"), [(c[0], c[2]) for c in LOAD], ids=[f"{c[0]} {c[1]}" for c in LOAD])
def test_load_model(field: str, make: Callable[[int], pb.ModelOptions], depth: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan_load(make(depth))
    assert caught.value.field == field
    assert "nested too deep" in str(caught.value)


def test_what_is_deep_but_not_too_deep() -> None:
    request = generation_request(chat(Tools=tool(schema(60))), stream=False, has_tool_parser=True)
    assert request.is_chat
    assert plan_load(pb.ModelOptions(Model=MODEL, EngineArgs=f'{{"hf_overrides":{objects(60)}}}')).model == MODEL
