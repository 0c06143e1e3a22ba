"""GBNF as the orchestrator writes it -> EBNF that xgrammar takes and that means the same."""

import contextlib
import json
import random
import re
import time
from typing import Any

import pytest
import xgrammar
from hypothesis import given
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string

from common.errors import InvalidRequest
from common.grammar import structured_outputs, xgrammar_ebnf

# The orchestrator's answer to "any JSON": rules over several lines, a comment in a rule, white space by recursion.
JSON_OBJECT = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\/bfnrt] | "u" [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F] [0-9a-fA-F]) # what may be escaped
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]*)) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws

ws ::= ([ \t\n] ws)?
"""
# llama.cpp's: white space has an alternative with nothing in it.
JSON_LLAMA = JSON_OBJECT.replace(r"([ \t\n] ws)?", r'| " " | "\n" [ \t]{0,20}').replace(
    "\nroot ", "\n# any object\nroot "
)
# One function call out of two; rule names with dashes, fixed texts with quotes in them.
TOOL_CALL = r"""root ::= tool-0 | tool-1
tool-0 ::= "{" space "\"name\":" space "\"get_weather\"" "," space "\"arguments\":" space arguments-0 "}" space
tool-1 ::= "{" space "\"name\":" space "\"clock\"" "," space "\"arguments\":" space "{" space "}" "}" space
arguments-0 ::= "{" space "\"city\":" space string "}" space
string ::= "\"" [^"\\]* "\"" space
space ::= " "?
"""


def accepts(gbnf: str, text: str) -> bool:
    return bool(_is_grammar_accept_string(xgrammar.Grammar.from_ebnf(xgrammar_ebnf(gbnf)), text))


@pytest.mark.parametrize(
    ("gbnf", "yes", "no"),
    [
        ('root ::= "a"', ["a"], ["", "b", "aa"]),
        # Alternatives with nothing in them.
        ('root ::= | "a"', ["", "a"], ["b"]),
        ('root ::= "a" |', ["", "a"], ["b"]),
        ('root ::= "a" | | "b"', ["", "a", "b"], ["ab"]),
        ("root ::= |", [""], ["a"]),
        ("root ::=", [""], ["a"]),
        ('root ::= (|"a"|) "b"', ["b", "ab"], ["a", "aab"]),
        ('root ::= () "b"', ["b"], [""]),
        ('root ::= (( | "a") | ) "b"', ["b", "ab"], [""]),
        ('root ::= ("a"|)+ "b"', ["b", "ab", "aab"], ["a"]),
        ('root ::= x "b"\nx ::= "a" |', ["b", "ab"], ["a"]),
        ('root ::= x "b"\nx ::= "a" |\n\ny ::= "c"', ["b", "ab"], ["c"]),
        ('root ::= x "b"\r\nx ::= "a" |\r\ny ::= "c"\r\n', ["b", "ab"], ["c"]),
        ('root ::= x "b"\nx ::= "a" | # or nothing\ny ::= "c"', ["b", "ab"], ["c"]),
        ('root ::=\n  | "a"\n  | "b"\n', ["", "a", "b"], ["c"]),
        ('root ::= ( # nothing, or\n | "a" ) "b"', ["b", "ab"], ["a"]),
        ('root ::= x "b"\nx ::= # nothing\n', ["b"], ["xb"]),
        # Any character.
        ('root ::= . "x"', ["ax", "\nx", ".x", "\N{GRINNING FACE}x", "東x"], ["x", "abx"]),
        ("root ::= .*", ["", "a.b\n"], []),
        ('root ::= .{2,3} "y"', ["aby", "abcy"], ["ay", "abcdy"]),
        ('root ::= ("a".|"b")', ["ax", "b"], ["a"]),
        # What only looks like one of these.
        ('root ::= "." "|" "#" "()" "::="', [".|#()::="], ["x|#()::="]),
        ("root ::= [.] [|] [#] [()]", [".|#(", ".|#)"], ["x|#("]),
        (r'root ::= "\"|\"." [\]|.]', ['"|".]', '"|".|'], ['"|"x]']),
        (r'root ::= "\\" "." # "c"', ["\\."], ["\\"]),
        ('root ::= [^.]+ "."', ["ab."], [".."]),
        ("root ::= [^|#]+", ["ab"], ["a|", "#"]),
        ('root ::= "<a>" [<>]', ["<a><"], ["<a>a"]),
        ('root ::= a | # | "x" | . \n b\na ::= "1"\nb ::= "2"', ["1", "2"], ["", "x"]),
        # Repetition, names, escapes.
        ('root ::= "a"{2} "b"{0,1} "c"{1,}', ["aac", "aabcc"], ["ac", "aabbc"]),
        ('root ::= a-b | a_1\na-b ::= "x"\na_1 ::= "y"', ["x", "y"], ["xy"]),
        (r'root ::= "\x41\u0042\U0001F600\t\n"', ["AB\N{GRINNING FACE}\t\n"], ["AB"]),
        (r"root ::= [\x41-\x43] [\u6771] [\n\t\-]", ["B東\n", "A東-"], ["D東\n"]),
        (r'root ::= "\[\]" [\[\]\"]', ['[]"', "[]]"], ["\\[\\]]"]),
        ('root ::= "é" [à-ü]', ["éé"], ["ea"]),
        ('root ::= "(" x ")"\nx ::= "" | "(" x ")"', ["()", "((()))"], ["(()"]),
    ],
)
def test_meaning(gbnf: str, yes: list[str], no: list[str]) -> None:
    assert [text for text in yes if not accepts(gbnf, text)] == []
    assert [text for text in no if accepts(gbnf, text)] == []


SOME_JSON = (
    '{"a": [1, -2.5e+10, true, null, "x\\n\\u00e9\\"", {}], "b": {"c": []}}',
    "{}",
    '{"a":1}',
    '{"東京":"\N{GRINNING FACE}"}',
)


@pytest.mark.parametrize("grammar", [JSON_OBJECT, JSON_LLAMA], ids=["recursive space", "llama.cpp's space"])
def test_json_grammar(grammar: str) -> None:
    for text in SOME_JSON:
        assert accepts(grammar, text)
        assert accepts(grammar, json.dumps(json.loads(text), ensure_ascii=False))
    for text in ("", "[]", "5", "{", '{"a"}', '{"a":1,}', '{"a":"\n"}', '{"a":tru}', "{a:1}", '{"a":"\\x"}'):
        assert not accepts(grammar, text)


def test_space_in_the_json_grammars() -> None:
    assert accepts(JSON_OBJECT, '{\n\t "a" :1}'.replace(" :", ":"))
    assert accepts(JSON_OBJECT, "{" + " \t\n" * 30 + "}")
    assert accepts(JSON_LLAMA, "{\n" + "\t" * 20 + "}")
    assert not accepts(JSON_LLAMA, "{\n" + "\t" * 21 + "}")
    assert not accepts(JSON_LLAMA, "{  }")


def test_tool_grammar() -> None:
    assert accepts(TOOL_CALL, '{"name": "get_weather","arguments": {"city": "Paris"}}')
    assert accepts(TOOL_CALL, '{"name":"clock","arguments":{}}')
    assert not accepts(TOOL_CALL, '{"name": "clock","arguments": {"city": "Paris"}}')


def test_lines_stay_where_they_are() -> None:
    gbnf = JSON_LLAMA + "more ::= . |\n# end"
    assert xgrammar_ebnf(gbnf).count("\n") == gbnf.count("\n")


@pytest.mark.parametrize(
    ("gbnf", "reason"),
    [
        ("no grammar at all", "no rule"),
        ("# root ::= only a comment", "no rule"),
        ('"root ::= in a string"', "root"),
        ('start ::= "a"', "root"),
        ('root ::= "a"\nroot2 ::= missing', "missing"),
        ('root ::= "a"\n\nx ::= "b" )', "line 3"),
        ('root ::= "open', "line 1"),
        ("root ::= [open", "line 1"),
        ('root ::= ("a"', "line 1"),
        ("::=", "line 1"),
        ('root ::= "a"\0 | "b"', "NUL"),
        ('root ::= "a" |\n  <think> "b"', "line 2: <think>"),
        ("root ::= !<[1000]>*", "line 1: !<[1000]>"),
        ('root ::= "a"{5,2}', ""),
        pytest.param("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "", id="deep"),
        ('r\N{LATIN SMALL LETTER U WITH DIAERESIS} ::= "a"', ""),
    ],
)
def test_a_grammar_that_cannot_be_used(gbnf: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        xgrammar_ebnf(gbnf)
    assert caught.value.field == "Grammar"
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".cc:" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "gbnf",
    [
        pytest.param("root ::= " + " | ".join(f'"w{number}"' for number in range(60_000)), id="alternatives"),
        pytest.param("root ::= x" + " | x" * 60_000 + '\nx ::= "a"', id="names"),
        pytest.param("root ::= " + "[" * 60_000, id="open classes"),
        pytest.param("root ::= " + '\\"' * 60_000, id="open strings"),
        pytest.param("root ::= " + "{" * 60_000, id="open counts"),
        pytest.param("root ::= " + "<" * 60_000, id="open tokens"),
    ],
)
def test_long_grammars_are_read_in_linear_time(gbnf: str) -> None:
    # It runs in the event loop: nobody else is answered meanwhile.
    started = time.process_time()
    with contextlib.suppress(InvalidRequest):
        xgrammar_ebnf(gbnf)
    assert time.process_time() - started < 2


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ENVELOPE = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("grammar", "metadata", "expected"),
    [
        ("", {}, {}),
        (" \n", {"json_schema": " ", "response_format": ""}, {}),
        ('root ::= "a"', {}, {"structured_outputs": {"grammar": 'root ::= "a"'}}),
        (json.dumps(SCHEMA), {}, {"structured_outputs": {"json": SCHEMA}}),
        ("\n " + json.dumps(SCHEMA), {}, {"structured_outputs": {"json": SCHEMA}}),
        ("", {"json_schema": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}}),
        ("", {"json_schema": json.dumps({"name": "x", "schema": SCHEMA})}, {"structured_outputs": {"json": SCHEMA}}),
        ("", {"response_format": json.dumps(ENVELOPE)}, {"structured_outputs": {"json": SCHEMA}}),
        ("", {"response_format": '{"type": "json_object"}'}, {"response_format": {"type": "json_object"}}),
        ("", {"response_format": '{"type": "text"}'}, {"response_format": {"type": "text"}}),
        # The schema is whole, the grammar made of it lost parts.
        ('root ::= "a"', {"json_schema": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}}),
        (
            'root ::= "a"',
            {"json_schema": "{}", "response_format": json.dumps(ENVELOPE)},
            {"structured_outputs": {"json": SCHEMA}},
        ),
    ],
)
def test_which_constraint_counts(grammar: str, metadata: dict[str, str], expected: dict[str, Any]) -> None:
    assert structured_outputs(grammar, metadata) == expected


@pytest.mark.parametrize(
    ("grammar", "metadata", "field"),
    [
        ("{", {}, "Grammar"),
        ('{"type": "nope"}', {}, "Grammar"),
        ('{"$ref": "#/nowhere"}', {}, "Grammar"),
        ('{"type": "string", "pattern": "(("}', {}, "Grammar"),
        pytest.param('{"a":' * 100_000, {}, "Grammar", id="deep"),
        ("root ::= missing", {}, "Grammar"),
        ("", {"json_schema": "[]"}, 'Metadata["json_schema"]'),
        ("", {"json_schema": "5"}, 'Metadata["json_schema"]'),
        ("", {"json_schema": "{"}, 'Metadata["json_schema"]'),
        ("", {"json_schema": '{"type": 5}'}, 'Metadata["json_schema"]'),
        ("", {"response_format": "json_object"}, 'Metadata["response_format"]'),
        ("", {"response_format": '"json_object"'}, 'Metadata["response_format"]'),
        ("", {"response_format": '{"type": "xml"}'}, 'Metadata["response_format"]'),
        ("", {"response_format": '{"type": ["text"]}'}, 'Metadata["response_format"]'),
        ("", {"response_format": '{"type": "json_schema"}'}, 'Metadata["response_format"].json_schema.schema'),
        (
            "",
            {"response_format": '{"type": "json_schema", "json_schema": {"schema": []}}'},
            'Metadata["response_format"].json_schema.schema',
        ),
    ],
)
def test_a_constraint_that_cannot_be_used(grammar: str, metadata: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        structured_outputs(grammar, metadata)
    assert caught.value.field == field
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "integer", "multipleOf": 2}',
        '{"type": "array", "uniqueItems": true}',
        '{"type": "object", "properties": {"a": {"type": "string", "format": "nope"}}}',
        '{"type": "string", "pattern": "a", "minLength": 5}',
        '{"properties": {"a": ' * 100 + "{}" + "}}" * 100,
    ],
    ids=lambda schema: schema[:50],
)
@pytest.mark.parametrize("field", ["Grammar", "json_schema", "response_format"])
def test_a_schema_that_the_engine_would_refuse(schema: str, field: str) -> None:
    # vLLM's own refusal would come later and name no field.
    metadata = {
        "Grammar": {},
        "json_schema": {"json_schema": schema},
        "response_format": {"response_format": f'{{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}'},
    }[field]
    with pytest.raises(InvalidRequest) as caught:
        structured_outputs(schema, metadata)
    assert field in caught.value.field


def test_a_deep_schema_is_refused_at_once() -> None:
    # xgrammar would read it for seconds.
    schema = '{"type": "object", "properties": {"a": ' * 300 + "{}" + "}}" * 300
    started = time.process_time()
    with pytest.raises(InvalidRequest):
        structured_outputs(schema, {})
    assert time.process_time() - started < 1


# Random grammars, each with a regular expression of the same meaning.
ALPHABET = 'ab#|."\\\n'


class Writer:
    """Writes random GBNF: comments, line breaks and blanks wherever llama.cpp and xgrammar allow them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rules: list[str] = []

    def grammar(self) -> tuple[str, str]:
        body, pattern = self.alternatives(3)
        rules = [f"root ::={self.blank()}{body}", *self.rules]
        return self.random.choice(["\n", "\n\n", " # | . (\n"]).join(rules) + self.random.choice(["", "\n"]), pattern

    def alternatives(self, depth: int, *, empty: bool = True) -> tuple[str, str]:
        count = self.random.randint(1, 3)
        parts = [self.sequence(depth) for _ in range(count)]
        # A rule of nothing at all would take the next rule's name for its body, also in llama.cpp.
        if not empty and count == 1 and not parts[0][0]:
            parts = [('"a"', "a")]
        return f"{self.gap()}|{self.gap()}".join(p[0] for p in parts), "|".join(p[1] for p in parts)

    def sequence(self, depth: int) -> tuple[str, str]:
        parts = [self.element(depth) for _ in range(self.random.choice([0, 1, 1, 2, 3]))]
        return " ".join(p[0] for p in parts), "".join(p[1] for p in parts)

    def element(self, depth: int) -> tuple[str, str]:
        kind = self.random.choice(["text", "text", "class", "any", "group", "rule"] if depth else ["text", "class"])
        if kind == "text":
            text = "".join(self.random.choices(ALPHABET, k=self.random.randint(1, 2)))
            written, pattern = self.quoted(text), f"(?:{re.escape(text)})"
        elif kind == "class":
            chars = self.random.sample('ab#|."', 2)
            negated = self.random.choice(["", "^"])
            written, pattern = f"[{negated}{''.join(chars)}]", f"[{negated}{''.join(chars)}]"
        elif kind == "any":
            written, pattern = ".", "."
        elif kind == "group":
            body, inner = self.alternatives(depth - 1)
            written, pattern = f"({self.gap()}{body}{self.gap()})", f"(?:{inner})"
        else:
            name = f"r-{len(self.rules)}"
            self.rules.append("")
            body, inner = self.alternatives(depth - 1, empty=False)
            self.rules[int(name[2:])] = f"{name} ::={self.blank()}{body}"
            written, pattern = name, f"(?:{inner})"
        repeat = self.random.choice(["", "", "", "?", "*", "+", "{2}", "{0,2}"])
        return written + repeat, pattern + repeat

    def quoted(self, text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    def blank(self) -> str:
        return self.random.choice([" ", "  ", "\n  "])

    def gap(self) -> str:
        return self.random.choice(["", " ", " ", "\n  ", ' # "x" | . ( ::=\n'])


@given(st.integers(0, 2**32), st.lists(st.text(ALPHABET + "x", max_size=4), max_size=8))
def test_random_grammars_mean_the_same(seed: int, texts: list[str]) -> None:
    gbnf, pattern = Writer(seed).grammar()
    grammar = xgrammar.Grammar.from_ebnf(xgrammar_ebnf(gbnf))
    for text in ["", *ALPHABET, *texts]:
        expected = re.fullmatch(pattern, text, re.DOTALL) is not None
        assert _is_grammar_accept_string(grammar, text) is expected, f"{text!r} with {gbnf!r}"
