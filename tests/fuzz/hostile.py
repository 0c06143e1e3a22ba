"""Cases that are messages in good order, with values that are not."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from common.pb import backend_pb2 as pb
from tests.fuzz.cases import Call
from tests.fuzz.messages import BACKEND, CHANGING, ENDLESS, METHODS, TEXTS, fill, text
from tests.models.script import line
from tests.process.wire import model_options, predict_options

_GENERATING = ("Predict", "PredictStream", "PredictStream", "TokenizeString")
_LINES = ("plain", "tool", "reasoning", "raw", "history", "two_tool_results")
_MIB = 2**20


def hostile(draw: random.Random) -> Call:
    """An RPC that a client with bad intentions or bugs might send."""
    kind = draw.random()
    if kind < 0.75:
        return _generation(draw)
    if kind < 0.83:
        size = draw.choice((0, 1, 5, 300))
        odd = (-1, 2**31 - 1, -(2**31), 774, 775, 776, 0, 5)
        tokens = [draw.choice(odd) if draw.random() < 0.1 else draw.randrange(700) for _ in range(size)]
        return Call(f"{BACKEND}Detokenize", (pb.DetokenizeRequest(tokens=tokens).SerializeToString(),))
    method = draw.choice([method for method in METHODS if method not in CHANGING])
    request = fill(draw, GetMessageClass(METHODS[method].input_type)(), 0.4)
    if isinstance(request, pb.PredictOptions):
        request.Tokens = 2
    requests = tuple([request.SerializeToString()] * (draw.randrange(3) if METHODS[method].client_streaming else 1))
    return Call(method, requests, _metadata(draw), 0.05 if method in ENDLESS else None)


def hostile_load(draw: random.Random) -> Call:
    """A LoadModel that must be refused before an engine is started, or a Free that is no message."""
    if draw.random() < 0.1:
        return Call(f"{BACKEND}Free", (b"\x0a\xff" + draw.randbytes(3),))
    options = model_options(Path("/nowhere/model"))
    fill(draw, options, draw.choice((0.0, 0.05, 0.3)))
    options.Model = options.ModelFile = draw.choice(("/nowhere", "", "/dev/null", "/", "\0", "a/b/c", "~", "x" * 5000))
    options.Options.extend(draw.choice(_OPTIONS) for _ in range(draw.randrange(4)))
    if draw.random() < 0.5:
        options.EngineArgs = draw.choice((*_ENGINE_ARGS, _json(draw)))
    return Call(f"{BACKEND}LoadModel", (options.SerializeToString(),))


_OPTIONS = (
    "--port:1",
    "--",
    "-",
    ":",
    "--dtype:float99",
    "--max-model-len:-5",
    "--max-model-len:99999999999999999999",
    "--gpu-memory-utilization:nan",
    "--tensor-parallel-size:0",
    "--help",
    "--config:/etc/passwd",
    "tool_parser:../../x",
    "tool_parser:" + "x" * 10_000,
    "--hf-overrides:{",
    "--" + "x" * 100_000,
    "\0",
    "ignore_seed:perhaps",
)
_ENGINE_ARGS = (
    "[]",
    "{",
    '{"a": 1}',
    '{"model": "/etc"}',
    '{"max_model_len": 1e999}',
    '{"max_model_len": "' + "9" * 5000 + '"}',
    '{"compilation_config": {"level": -1}}',
    '{"speculative_config": {"method": "x"}}',
    '{"worker_cls": "os.system"}',
    "[" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
)


def _generation(draw: random.Random) -> Call:
    options = predict_options(line(draw.choice(_LINES)), Tokens=draw.randrange(1, 4))
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        draw.choice(_HOSTILITIES)(draw, options)
    rpc = draw.choice(_GENERATING)
    # Who asks for an answer without an end does not stay for it.
    leaves = draw.uniform(0, 0.3) if options.Tokens <= 0 or options.Tokens > 64 or draw.random() < 0.03 else None
    return Call(f"{BACKEND}{rpc}", (options.SerializeToString(),), _metadata(draw), leaves)


def _metadata(draw: random.Random) -> tuple[tuple[str, str | bytes], ...]:
    if draw.random() < 0.9:
        return ()
    return draw.choice(
        (
            (("x", ""),),
            (("authorization", "Bearer "),),
            (("x-bin", bytes(range(256))),),
            (("a" * 1000, "b"),),
            (("user-agent", "\x20\x7e" * 100),),
            tuple((f"k{index}", "v") for index in range(50)),
            (("x", "y" * 6000),),
            (("grpc-encoding", "gzip"),),
            (("traceparent", "00-zz-zz-zz"), ("tracestate", "=")),
        )
    )


# One hostile value each


def _numbers(draw: random.Random, options: pb.PredictOptions) -> None:
    floats = (float("nan"), float("inf"), -float("inf"), -1.0, 1e-45, 3.4e38, 2.0, 2.1, -2.1, 0.0, 1e-6)
    whole = (-1, -2, 0, 1, 20, 21, 2**31 - 1, -(2**31))
    field: Any = draw.choice(options.DESCRIPTOR.fields)
    while field.is_repeated or field.type not in (field.TYPE_FLOAT, field.TYPE_INT32):
        field = draw.choice(options.DESCRIPTOR.fields)
    setattr(options, field.name, draw.choice(floats if field.type == field.TYPE_FLOAT else whole))


def _anything(draw: random.Random, options: pb.PredictOptions) -> None:
    tokens = options.Tokens
    fill(draw, options, draw.choice((0.05, 0.3, 0.9)))
    options.Tokens = tokens
    if draw.random() < 0.8:
        options.ModelIdentity = ""


def _long(draw: random.Random, options: pb.PredictOptions) -> None:
    """Prompts as long as the context, a little longer, and far longer."""
    size = draw.choice((4090, 4095, 4096, 4097, 20_000, 100_000)) if draw.random() < 0.9 else _MIB
    content = draw.choice(("fox ", "a", "\n", "é", "🌍", "<|im_end|>", " ")) * (size // 4)
    if draw.random() < 0.5:
        options.UseTokenizerTemplate = False
        options.Prompt = content
    else:
        del options.Messages[:]
        options.UseTokenizerTemplate = True
        options.Messages.add(role="user", content=content)


def _messages(draw: random.Random, options: pb.PredictOptions) -> None:
    options.UseTokenizerTemplate = True
    for _ in range(draw.choice((0, 1, 2, 30))):
        options.Messages.add(
            role=draw.choice(("user", "assistant", "system", "tool", "developer", "", "root", "user\0")),
            content=text(draw),
            name=draw.choice(("", "x" * 500, "\0")),
            tool_call_id=draw.choice(("", "call_1", "💥")),
            reasoning_content=draw.choice(("", "hm", "</think>")),
            tool_calls=draw.choice(("", "[]", _json(draw), '[{"function": {"name": "f", "arguments": "{"}}]')),
        )


def _tools(draw: random.Random, options: pb.PredictOptions) -> None:
    parameters = draw.choice((None, {}, {"type": "object"}, _value(draw, 0), _schema(draw)))
    one = {"type": "function", "function": {"name": draw.choice(("f", "", "a b", "💥")), "parameters": parameters}}
    many = draw.choice((1, 1, 2, 100, 3000)) if draw.random() < 0.3 else 1
    # A little over the longest message; far longer ones would cost nobody but this client its time.
    many = min(many, max(60 * _MIB // len(json.dumps(one)), 1))
    tools = [json.loads(json.dumps(one)) for _ in range(many)]
    for index, tool in enumerate(tools[1:]):
        tool["function"]["name"] = f"f{index}"
    options.Tools = draw.choice((json.dumps(tools), json.dumps(tools), _json(draw)))
    options.ToolChoice = draw.choice(
        ("", "auto", "required", "none", '"required"', '{"type": "function", "function": {"name": "f"}}', _json(draw))
    )


def _logit_bias(draw: random.Random, options: pb.PredictOptions) -> None:
    options.LogitBias = draw.choice(
        (
            json.dumps({str(token): draw.uniform(-100, 100) for token in range(draw.choice((775, 776, 768, 100_000)))}),
            '{"-1": 1}',
            '{"1": 1e400}',
            '{"1": NaN}',
            '{"99999999999999999999": 1}',
            '{"٣": 1}',
            '{"²": 1}',
            '{"1": true}',
            '{"1": "1"}',
            '{"0001": 5, "1": 6}',
            '{"' + "9" * 5000 + '": 1}',
            _json(draw),
        )
    )


def _stops(draw: random.Random, options: pb.PredictOptions) -> None:
    del options.StopPrompts[:]
    count = draw.choice((1, 3, 1000, 1024, 1025, 20_000))
    options.StopPrompts.extend(f"{text(draw)[:40]}{index or ''}" for index in range(count))


def _media(draw: random.Random, options: pb.PredictOptions) -> None:
    field = draw.choice((options.Images, options.Videos, options.Audios))
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + draw.randbytes(60)).decode()
    bomb = "data:image/png;base64," + "A" * draw.choice((10, 1000, 400_000))
    field.extend(
        draw.choice((png, png[:-1], bomb, "", "!!!", "data:,", "data:image/svg+xml,<svg/>", *TEXTS))
        for _ in range(draw.choice((1, 2, 30)))
    )


def _metadata_field(draw: random.Random, options: pb.PredictOptions) -> None:
    key = draw.choice(
        (
            "enable_thinking",
            "reasoning_effort",
            "chat_template_kwargs",
            "continue_final_message",
            "lora",
            "cache_salt",
            "",
            "x",
        )
    )
    options.Metadata[key] = draw.choice(("true", "", text(draw), _json(draw), "x" * 129, "x" * 100_000))


def _template_kwargs(draw: random.Random, options: pb.PredictOptions) -> None:
    name = draw.choice(
        (
            "add_generation_prompt",
            "tools",
            "messages",
            "chat_template",
            "tokenize",
            "return_tensors",
            "self",
            "conversation",
            "documents",
            "truncation",
            "max_length",
            "x",
            "",
            "return_dict",
            "bos_token",
            "range",
            "continue_final_message",
            "tokenizer",
            "padding",
            "model_config",
            "tojson",
            "raise_exception",
        )
    )
    options.Metadata["chat_template_kwargs"] = json.dumps({name: _value(draw, 0)})


def _schemas(draw: random.Random, options: pb.PredictOptions) -> None:
    if draw.random() < 0.1:
        depth = draw.choice((200, 2000, 20_000))
        schema = '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth
    else:
        schema = json.dumps(_schema(draw))
    if draw.random() < 0.5:
        options.Metadata["json_schema"] = schema
    elif draw.random() < 0.5:
        options.Grammar = schema
    else:
        kind = draw.choice(("json_schema", "json_schema", "json_object", "text"))
        options.Metadata["response_format"] = (
            f'{{"type": "{kind}", "json_schema": {{"name": "x", "schema": {schema}}}}}'
        )


def _grammar(draw: random.Random, options: pb.PredictOptions) -> None:
    options.Grammar = draw.choice(_GRAMMARS)(draw) if draw.random() < 0.5 else _random_grammar(draw)


def _other_model(draw: random.Random, options: pb.PredictOptions) -> None:
    options.ModelIdentity = text(draw)


def _identifier(draw: random.Random, options: pb.PredictOptions) -> None:
    options.CorrelationId = draw.choice(("x" * 256, "x" * 257, "same", "\n", text(draw)))


_HOSTILITIES: tuple[Callable[[random.Random, pb.PredictOptions], None], ...] = (
    _numbers,
    _numbers,
    _numbers,
    _anything,
    _anything,
    _long,
    _messages,
    _messages,
    _tools,
    _tools,
    _logit_bias,
    _stops,
    _media,
    _metadata_field,
    _template_kwargs,
    _schemas,
    _schemas,
    _grammar,
    _grammar,
    _other_model,
    _identifier,
)


# JSON, schemas, grammars


def _json(draw: random.Random) -> str:
    """A JSON text, or nearly."""
    return draw.choice(
        (
            json.dumps(_value(draw, 0)),
            json.dumps(_value(draw, 0))[:-1],
            "[" * draw.choice((10, 900, 100_000)),
            "[" * 800 + "]" * 800,
            '{"a":' * 20_000 + "1" + "}" * 20_000,
            '"\\ud800"',
            '"\\udc00\\ud800"',
            "1e999",
            "9" * 5000,
            "-0",
            "NaN",
            '{"a": 1, "a": 2}',
            '{"__proto__": {}}',
            "[1,]",
            "'single'",
            "\ufeff{}",
        )
    )


def _value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(8 if depth < 4 else 6)
    if kind < 6:
        return draw.choice((None, True, False, 0, -1, 1.5, 2**53, 2**70, 1e308, "", "x", text(draw)))
    if kind == 6:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(("a", "", text(draw))): _value(draw, depth + 1) for _ in range(draw.randrange(4))}


_TYPES: tuple[Any, ...] = (
    "string",
    "integer",
    "number",
    "boolean",
    "null",
    "array",
    "object",
    "any",
    "",
    None,
    ["string", "null"],
    [],
    7,
)
_PATTERNS = (
    "^a+$",
    "(",
    "[",
    "(?=a)b",
    "\\1",
    "(a*)*$",
    "^(a|a)*$",
    "\\p{L}+",
    "^.{1,1000}$",
    "^(a{1,30}){1,30}$",
    "a{3,1}",
    "\\u0000",
    "[z-a]",
    "(?i)x",
    "^" + "(a|b)?" * 50 + "$",
    "\\d{2,9}-\\w+",
    "$^",
    "a{99999999999}",
    "\\",
    "(?<n>a)\\k<n>",
)


def _schema(draw: random.Random, depth: int = 0) -> Any:
    if depth == 0 and draw.random() < 0.25:
        return draw.choice(_SCHEMAS)(draw)
    schema: dict[str, Any] = {}
    if draw.random() < 0.8:
        schema["type"] = draw.choice(_TYPES)
    for key, make in _KEYWORDS:
        if draw.random() < 0.12:
            schema[key] = make(draw, depth) if draw.random() < 0.9 else _value(draw, 3)
    return schema


def _subschema(draw: random.Random, depth: int) -> Any:
    return _schema(draw, depth + 1) if depth < 3 else {"type": "string"}


def _subschemas(draw: random.Random, depth: int) -> Any:
    return [_subschema(draw, depth) for _ in range(draw.randrange(3))]


def _named_subschemas(draw: random.Random, depth: int) -> Any:
    return {draw.choice(("a", "b", "", "\0", "é", '"')): _subschema(draw, depth) for _ in range(draw.randrange(3))}


def _bound(draw: random.Random, _depth: int) -> Any:
    return draw.choice((0, 1, 5, -1, 1.5, 1000, 2**31, 2**63, 1e300, -0.0))


_KEYWORDS: tuple[tuple[str, Callable[[random.Random, int], Any]], ...] = (
    *((key, _bound) for key in ("minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength", "minItems")),
    *((key, _bound) for key in ("maxItems", "minProperties", "maxProperties", "multipleOf")),
    *((key, _named_subschemas) for key in ("properties", "$defs", "patternProperties", "dependentSchemas")),
    *((key, _subschemas) for key in ("anyOf", "oneOf", "allOf", "prefixItems")),
    *((key, _subschema) for key in ("items", "additionalProperties", "not", "if", "propertyNames", "contains")),
    ("enum", lambda draw, _: [_value(draw, 3) for _ in range(draw.randrange(4))]),
    ("const", lambda draw, _: _value(draw, 2)),
    ("required", lambda draw, _: draw.choice((["a"], ["a", "zz"], [1], "a", []))),
    ("pattern", lambda draw, _: draw.choice(_PATTERNS)),
    ("format", lambda draw, _: draw.choice(("date", "email", "uuid", "regex", "x", 5))),
    ("$ref", lambda draw, _: draw.choice(("#", "#/$defs/a", "#/x", "http://127.0.0.1:1/", "", 5))),
)


_SCHEMAS: tuple[Callable[[random.Random], Any], ...] = (
    lambda draw: {"enum": [f"word{index}" for index in range(draw.choice((100, 2000, 100_000)))]},
    lambda draw: {
        "type": "object",
        "properties": {f"p{index}": {"type": "string"} for index in range(draw.choice((50, 300, 3000)))},
    },
    lambda draw: {"type": "array", "items": {"type": "integer"}, "maxItems": draw.choice((1000, 100_000, 2**40))},
    lambda draw: {"type": "string", "maxLength": draw.choice((1000, 100_000, 2**40))},
    lambda draw: {"type": "string", "pattern": draw.choice(_PATTERNS)},
    lambda _: {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    lambda _: {"type": "integer", "minimum": 0, "maximum": 10**400},
    lambda _: {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
)
_GRAMMARS: tuple[Callable[[random.Random], str], ...] = (
    lambda draw: _chain(draw.choice((10, 1000, 100_000))),
    lambda draw: "root ::= " + " | ".join(f'"w{index}"' for index in range(draw.choice((10, 1000, 60_000)))),
    lambda draw: 'root ::= "a"{1,' + draw.choice(("5", "100000", "99999999999999", "x", "")) + "}",
    lambda draw: "root ::= " + "(" * (depth := draw.choice((3, 900, 100_000))) + '"a"' + ")" * depth,
    lambda _: "root ::= ((([a-z]{1,100}){1,100}){1,100}){1,100}",
    lambda _: 'root ::= root "a" | "b"',
    lambda _: "root ::= root",
    lambda _: "root ::= s\ns ::= s s s | s s | [a-z ]*",
    lambda _: "root ::= ([a-z ] | root)*",
    lambda _: "root ::= nothing",
    lambda _: 'root ::= (("")*)*',
    lambda _: "root ::= [z-a]",
    lambda _: 'root ::= "\\xZZ"',
    lambda _: 'root ::= "' + "a" * 1_000_000 + '"',
    lambda _: "root ::= x{1,100000}\nx ::= y{1,100000}\ny ::= [a-z]?",
    lambda draw: "root ::= " + '"a"? ' * draw.choice((10, 100, 5000)),
    text,
)


def _chain(rules: int) -> str:
    return (
        "root ::= r0\n" + "\n".join(f'r{index} ::= "a" r{index + 1}' for index in range(rules)) + f'\nr{rules} ::= "b"'
    )


def _random_grammar(draw: random.Random) -> str:
    """Pieces of GBNF in any order, under the rules' names."""
    pieces: tuple[str, ...] = (
        '"a"',
        "[a-z]",
        "[^\\n]",
        ".",
        "x",
        "root",
        "(",
        ")",
        "|",
        "?",
        "+",
        "*",
        "{2}",
        "{1,3}",
        "<t>",
        '"',
        "[",
        "\n",
        "#c\n",
    )
    if draw.random() < 0.5:
        pieces = ('"a"', "[a-z]", "x", '"b" x', "|", '("c" | "d")', '"e"?', '"f"+', '"g"{2,4}', "x?")
    rules = [" ".join(draw.choices(pieces, k=draw.randrange(1, 10))) for _ in range(2)]
    return f"root ::= {rules[0]}\nx ::= {rules[1]}"
