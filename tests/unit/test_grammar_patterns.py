"""Patterns of a schema that xgrammar would compile for minutes, and those next to them that it takes in seconds."""

import json

import pytest
import xgrammar
from vllm.sampling_params import StructuredOutputsParams

from common.errors import InvalidRequest
from common.grammar import check_tools, structured_outputs, xgrammar_ebnf
from common.grammar_patterns import too_much_in_patterns


def schema(*patterns: str) -> str:
    return json.dumps({"type": "object", "properties": {p: {"type": "string", "pattern": p} for p in patterns}})


def refusal(*patterns: str) -> str | None:
    return too_much_in_patterns(str(xgrammar.Grammar.from_json_schema(schema(*patterns))))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("^(([a-z]{1,10}){1,10}){1,10}$", "repeat less"),
        ("([a-z]{1,30}){1,30}", "repeat less"),
        ("([a-z]{1,100}){1,100}", "repeat less"),
        ("^([a-z]{1,20}){1,20}$", "repeat less"),
        ("^([a-z0-9]{1,30}-?){1,30}$", "repeat less"),
        ("^([a-z]{1,30}[a-z0-9]){1,30}$", "repeat less"),
        ("^([ -~]{1,40}[ -~]){1,5}$", "repeat less"),
        ("^(.{1,10}){1,10}$", "repeat less"),
        ("^(([a-z]?){100}){100}$", "written out"),
        ("^(a|(?:b[(){5,}]\\)){120}){120}$", "written out"),
        ("^[0-9]{129}$", "128 times"),
    ],
)
def test_refused(pattern: str, why: str) -> None:
    assert why in (refusal(pattern) or "")


@pytest.mark.parametrize(
    "pattern",
    [
        "^([0-9]{128}){1,20}$",
        "^([a-z]{128}){1,20}$",
        "^[a-z]{1,128}$",
        "^.{1,128}$",
        "^([a-z]{1,10}){1,10}$",
        "^([a-z]{1,30}-){1,30}$",
        "^([a-z]+)*$",
        "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-5][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}$",
        r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d(:[0-5]\d(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})$",
        r"^[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}$",
        r"^[a-zA-Z0-9._%+-]{1,64}@[a-zA-Z0-9.-]{1,128}\.[a-zA-Z]{2,24}$",
        r"^((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)$",
        (
            "^(([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|([0-9a-fA-F]{1,4}:){1,6}:[0-9a-fA-F]{1,4}|"
            "([0-9a-fA-F]{1,4}:){1,4}(:[0-9a-fA-F]{1,4}){1,3}|:((:[0-9a-fA-F]{1,4}){1,7}|:))$"
        ),
        r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?(?:\+[0-9A-Za-z-]+)?$",
        "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]{2,63}$",
        r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.){1,10}[a-z]{2,63}$",
        r"^https?://[^\s/$.?#].[^\s]*$",
        "^[a-z0-9]+(-[a-z0-9]+)*$",
        r"^(\w+\s?){1,20}$",
        '^["\\\\?é東\U0001f389]{1,20}(?:"|Regex\\("a"\\))?$',
    ],
)
def test_taken(pattern: str) -> None:
    assert refusal(pattern) is None


def test_the_sum_counts_and_the_same_pattern_once() -> None:
    # 8,500 tries each.
    patterns = [f"^([a-z]{{1,10}}){{1,10}}{end}$" for end in ("", "0", "1", "2")]
    assert refusal(*patterns[:3]) is None
    assert "repeat less" in (refusal(*patterns) or "")
    same = {f"p{i}": {"type": "string", "pattern": patterns[0]} for i in range(10)}
    structured_outputs(json.dumps({"type": "object", "properties": same}), {})


def test_wherever_a_pattern_may_stand() -> None:
    bad = schema("^(([a-z]{1,10}){1,10}){1,10}$")
    content = {"type": "json_schema", "json_schema": json.loads(bad)}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<", "end": ">", "content": content}}
    fields = []
    for give in (
        lambda: structured_outputs(bad, {}),
        lambda: structured_outputs("", {"json_schema": bad}),
        lambda: xgrammar_ebnf('root ::= Regex("^(([a-z]{1,10}){1,10}){1,10}$")'),
        lambda: check_tools(StructuredOutputsParams(json=bad)),
        lambda: check_tools(StructuredOutputsParams(structural_tag=json.dumps(tag))),
    ):
        with pytest.raises(InvalidRequest, match="repeat less") as caught:
            give()
        fields.append(caught.value.field)
    assert fields == ["Grammar", 'Metadata["json_schema"]', "Grammar", "Tools", "Tools"]


def test_what_only_looks_like_a_pattern() -> None:
    assert xgrammar_ebnf(r'root ::= "Regex(\"(([a-z]{1,10}){1,10}){1,10}\")" [Regex("((")]')
