"""Grammars that would stop the engine for everybody, and those next to them that it takes easily."""

import json
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from common.errors import InvalidRequest
from common.grammar import check_tools, structured_outputs, xgrammar_ebnf


def chain(rules: int) -> str:
    return "root ::= r0\n" + "\n".join(f'r{i} ::= "a" r{i + 1}' for i in range(rules)) + f'\nr{rules} ::= "b"'


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (chain(10_000), "characters of rules"),
        ('root ::= "' + "a" * 100_000 + '"', "characters of rules"),
        ("root ::= " + '"a"? ' * 65, "65 optional parts"),
        ("root ::= ((([a-z]{1,100}){1,100}){1,100}){1,100}", "repetition of a repetition"),
        ("root ::= (([a-z]{1,10}){1,10}){1,10}", "repetition of a repetition"),
        ("root ::= ([a-z]{1,10}){1,1000}", "10000 times"),
        ("root ::= a*\na ::= b*\nb ::= c*\nc ::= [a-z]*", "repetition of a repetition"),
        ("root ::= a+\na ::= b+\nb ::= c+\nc ::= [a-z]", "repetition of a repetition"),
        ("root ::= x{1,100000}\nx ::= y{1,100000}\ny ::= [a-z]?", "times in all"),
        ("root ::= root", "rule root never ends"),
        ('root ::= x [a-z]\nx ::= x "a" x? | "b" x', "never ends"),
        ('root ::= "a" | "b" x\nx ::= y+\ny ::= x{2,3} "c"', "never ends"),
        ("root ::= s\ns ::= s s s | s s | [a-z ]*", "rule s can be several of itself"),
        ('root ::= root root | "a"', "rule root can be several of itself"),
        ('root ::= "x" s\ns ::= s s s | "a"', "rule s can be several of itself"),
        ('root ::= s\ns ::= s{2} | "a"', "rule s can be several of itself"),
        ('root ::= s\ns ::= s{0,3} | "a"', "rule s can be several of itself"),
        ("root ::= ([a-z] | root)*", "can be several of itself"),
        ('root ::= blank t blank t blank\nt ::= root | "a"\nblank ::= " "?', "can be several of itself"),
        ("root ::= a\na ::= b c\nb ::= a?\nc ::= b | [0-9]", "can be several of itself"),
    ],
    ids=lambda value: value[:40],
)
def test_refused(grammar: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        xgrammar_ebnf(grammar)
    assert caught.value.field == "Grammar"


@pytest.mark.parametrize(
    "grammar",
    [
        chain(1000),
        "root ::= " + '"a"? ' * 64,
        'root ::= ([a-z]{1,100} " "){1,100}',
        "root ::= ([a-z]{1,30}){1,30}",
        'root ::= (ws "x" ws)*\nws ::= [ \\n]*',
        'root ::= sum\nsum ::= sum [+-] term | term\nterm ::= [0-9]+ | "(" sum ")"',
        "root ::= root [+-] root | [0-9]",
        'root ::= s\ns ::= "(" s ")" s | ""',
        'root ::= value\nvalue ::= "[" (value ("," value)*)? "]" | "{" (text ":" value)* "}" | text\ntext ::= [a-z]*',
        'root ::= a a\na ::= b b\nb ::= c c\nc ::= "x"?',
        'root ::= s\ns ::= s{0} "a"? "b"',
        'root ::= "a" root? | x\nx ::= [0-9]* "b" (=root)',
    ],
    ids=lambda value: value[:40],
)
def test_taken(grammar: str) -> None:
    assert xgrammar_ebnf(grammar)


def test_schemas() -> None:
    items = {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 1000}
    strings = [{"type": "string", "pattern": "^([0-9]{128}){1,20}$"}, {"type": "string", "maxLength": 1000}]
    for taken in (items, *strings):
        assert structured_outputs(json.dumps(taken), {})
    for schema in (
        {"enum": [f"word{i}" for i in range(100_000)]},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
        {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[0-9]{129}$"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    ):
        with pytest.raises(InvalidRequest) as caught:
            structured_outputs("", {"json_schema": json.dumps(schema)})
        assert caught.value.field == 'Metadata["json_schema"]'


def constraint_of(kind: str, *parameters: dict[str, Any]) -> StructuredOutputsParams:
    """What vLLM makes of tools with these parameters: a named one, calls of any, or calls of strict ones."""
    if kind == "named":
        return StructuredOutputsParams(json=parameters[0])
    if kind == "required":
        defs = {name: schema for each in parameters for name, schema in each.get("$defs", {}).items()}
        names = [{"type": "string", "enum": [f"f{i}"]} for i in range(len(parameters))]
        tools = [
            {"properties": {"name": name, "parameters": each}, "required": ["name", "parameters"]}
            for name, each in zip(names, parameters, strict=True)
        ]
        items = {"type": "object", "anyOf": tools}
        return StructuredOutputsParams(json={"type": "array", "minItems": 1, "items": items, "$defs": defs})
    tags = [
        {"type": "tag", "begin": f"<f{i}>", "end": "</f>", "content": {"type": "json_schema", "json_schema": each}}
        for i, each in enumerate(parameters)
    ]
    calls = {"type": "triggered_tags", "triggers": ["<f"], "tags": tags}
    return StructuredOutputsParams(structural_tag=json.dumps({"type": "structural_tag", "format": calls}))


KINDS = ["named", "required", "strict"]


def properties(count: int, schema: dict[str, Any], prefix: str = "p") -> dict[str, Any]:
    return {"type": "object", "properties": {f"{prefix}{i}": schema for i in range(count)}}


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (properties(3000, {"type": "string"}), "characters of rules"),
        (properties(1, {"enum": [f"word{i}" for i in range(30_000)]}), "characters of rules"),
        # Below the limit of the sum.
        (properties(1, {"enum": [f"word{i}" for i in range(8000)]}), "at most 100000"),
        (properties(1, {"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/a"}}}, "never ends"),
    ],
    ids=["properties", "enum", "short enum", "endless"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_tools_refused(kind: str, schema: dict[str, Any], why: str) -> None:
    small = properties(1, {"type": "string"})
    with pytest.raises(InvalidRequest, match=why) as caught:
        check_tools(constraint_of(kind, *[schema] if kind == "named" else [small, schema]))
    assert caught.value.field == "Tools"


@pytest.mark.parametrize("kind", ["required", "strict"])
def test_many_tools(kind: str) -> None:
    tools = [properties(1, {"enum": [f"word{i} {j}" for j in range(1000)]}) for i in range(30)]
    check_tools(constraint_of(kind, *tools[:18]))
    with pytest.raises(InvalidRequest, match="at most 512000"):
        check_tools(constraint_of(kind, *tools))


@pytest.mark.parametrize("length", [128, 129])
@pytest.mark.parametrize("kind", KINDS)
def test_patterns_of_tools(kind: str, length: int) -> None:
    schema = {"type": "object", "properties": {"digits": {"type": "string", "pattern": f"^[0-9]{{{length}}}$"}}}
    constraint = constraint_of(kind, schema)
    if length == 128:
        check_tools(constraint)
        return
    with pytest.raises(InvalidRequest, match="128 times") as caught:
        check_tools(constraint)
    assert caught.value.field == "Tools"
