"""`Grammar` and the structured-output keys of `Metadata` -> what vLLM's xgrammar backend takes.

The orchestrator writes llama.cpp's GBNF. xgrammar reads that, but for three things: empty alternatives and `.` are
rewritten here; references to tokens (`<tok>`, `!<tok>`) it can't express, and they are refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import xgrammar
from vllm.sampling_params import StructuredOutputsParams, check_json_nesting
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

from common.errors import InvalidRequest
from common.grammar_limits import MOST_CHARACTERS_OF_TOOLS, too_much
from common.grammar_patterns import too_much_in_patterns
from common.json_values import parse_json

# What is not closed is one token to the end: xgrammar names its line, and no input is read more than once.
_TOKEN = re.compile(
    r'"(?:\\.|[^"\\])*"?'  # string
    r"|\[(?:\\.|[^\]\\])*\]?"  # character class
    r"|#[^\n]*"
    r"|::=|!?<[^<>\s]*>|[()|*+?]|\{[^}]*\}?|[A-Za-z0-9_-]+|\s+|.",
    re.DOTALL,
)
_TOKEN_REFERENCE = re.compile(r"!?<[^<>\s]*>")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_ANY_CHARACTER = r"[\u0000-\U0010FFFF]"


def structured_outputs(grammar: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a request: empty, or `structured_outputs`, or `response_format`.

    `Metadata["response_format"]` comes first, then `Metadata["json_schema"]`, then `Grammar`: the orchestrator makes
    the grammar out of the schema and loses parts of it.

    Raises:
        InvalidRequest: a constraint that xgrammar can't compile, with the line and the reason.

    """
    if text := metadata.get("response_format", "").strip():
        value = parse_json('Metadata["response_format"]', text)
        if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
            raise InvalidRequest('Metadata["response_format"]', "type must be text, json_object or json_schema")
        if value["type"] == "json_schema":
            inner = value.get("json_schema")
            schema = inner.get("schema") if isinstance(inner, dict) else None
            return _json_schema('Metadata["response_format"].json_schema.schema', schema)
        return {"response_format": {"type": value["type"]}}
    if text := metadata.get("json_schema", "").strip():
        value = parse_json('Metadata["json_schema"]', text)
        if isinstance(value, dict) and isinstance(value.get("schema"), dict):
            value = value["schema"]
        return _json_schema('Metadata["json_schema"]', value)
    if not grammar.strip():
        return {}
    if grammar.lstrip().startswith("{"):
        return _json_schema("Grammar", parse_json("Grammar", grammar))
    return {"structured_outputs": {"grammar": xgrammar_ebnf(grammar)}}


def xgrammar_ebnf(gbnf: str) -> str:
    """The same grammar in xgrammar's EBNF; same lines, so that its error messages fit.

    Raises:
        InvalidRequest: xgrammar can't read it.

    """
    if "\0" in gbnf:
        raise InvalidRequest("Grammar", "has a NUL character, where xgrammar would stop reading")
    ebnf = _rewrite(gbnf)
    if "::=" not in ebnf:
        raise InvalidRequest("Grammar", "has no rule; write GBNF rules (root ::= …) or a JSON schema object")
    try:
        grammar = xgrammar.Grammar.from_ebnf(ebnf)
    except Exception as error:  # noqa: BLE001  # xgrammar raises what its C++ gives
        raise InvalidRequest("Grammar", _reason(error)) from None
    if excess := _excess(grammar):
        raise InvalidRequest("Grammar", excess)
    return ebnf


def check_tools(constraint: StructuredOutputsParams) -> None:
    """Return where xgrammar can compile what calls of strict, required or named tools must match, and in seconds.

    Raises:
        InvalidRequest: it can't; the engine would find out later, and end the request with an error, or wait for it.

    """
    try:
        if constraint.structural_tag is not None:
            grammar = xgrammar.Grammar.from_structural_tag(constraint.structural_tag)
        elif constraint.json is not None:
            grammar = xgrammar.Grammar.from_json_schema(constraint.json)
        else:
            return
        rules = str(grammar)
        excess = too_much(rules, MOST_CHARACTERS_OF_TOOLS)
        for schema in () if excess else _schemas_of_tools(constraint):
            excess = excess or too_much(str(xgrammar.Grammar.from_json_schema(json.dumps(schema))))
    except Exception as error:  # noqa: BLE001  # xgrammar raises what its C++ gives
        raise InvalidRequest("Tools", _reason(error)) from None
    if excess := excess or too_much_in_patterns(rules):
        raise InvalidRequest("Tools", excess)


def _schemas_of_tools(constraint: StructuredOutputsParams) -> Iterator[dict[str, Any]]:
    """The schema of each tool: `json` holds one, or an array's of several, a structural tag has them at any depth."""
    if constraint.json is not None:
        whole = json.loads(constraint.json) if isinstance(constraint.json, str) else constraint.json
        items = whole.get("items")
        for schema in items.get("anyOf") or [whole] if isinstance(items, dict) else [whole]:
            if isinstance(schema, dict):
                yield {"$defs": whole.get("$defs", {})} | schema
        return
    waiting = [json.loads(constraint.structural_tag or "{}")]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict) and isinstance(node.get("json_schema"), dict):
            yield node["json_schema"]
        elif isinstance(node, dict):
            waiting += node.values()


def _rewrite(gbnf: str) -> str:
    """Insert `""` into empty alternatives, spell `.` as a class, drop escapes that xgrammar lacks and comments."""
    tokens = [token for token in _TOKEN.findall(gbnf) if not token.startswith("#")]
    out: list[str] = []
    previous = ""  # the last token that is not blank
    line = 1
    for index, token in enumerate(tokens):
        if token.isspace():
            out.append(token)
            line += token.count("\n")
            continue
        if _TOKEN_REFERENCE.fullmatch(token):
            raise InvalidRequest("Grammar", f"line {line}: {token} refers to a token; xgrammar has no such rule")
        if token == "|" and previous in ("|", "(", "::="):  # noqa: S105  # a grammar's token, no password
            out.append('"" ')
        elif token == ")" and previous in ("|", "("):  # noqa: S105
            out.append('""')
        elif previous == "|" and _starts_rule(tokens, index):
            _insert_before_blank(out, ' ""')
        out.append(_spelled(token))
        previous = token
    if previous in ("|", "::="):
        out.append(' ""')
    return "".join(out)


def _spelled(token: str) -> str:
    if token == ".":  # noqa: S105
        return _ANY_CHARACTER
    if token.startswith('"'):
        # llama.cpp lets brackets be escaped in strings too.
        return re.sub(r"\\(.)", lambda match: match[1] if match[1] in "[]" else match[0], token, flags=re.DOTALL)
    return token


def _starts_rule(tokens: list[str], index: int) -> bool:
    """Whether `tokens[index]` is the name of the next rule: it stands before `::=`, with at most one blank between."""
    following = tokens[index + 1 : index + 3]
    if following and following[0].isspace():
        following = following[1:]
    return following[:1] == ["::="] and _NAME.fullmatch(tokens[index]) is not None


def _insert_before_blank(out: list[str], text: str) -> None:
    position = len(out)
    while position and out[position - 1].isspace():
        position -= 1
    out.insert(position, text)


def _json_schema(field: str, schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise InvalidRequest(field, "must be a JSON schema object")
    try:
        # The engine's own checks, which it would make later and without the field's name.
        check_json_nesting(schema)
        unsupported = has_xgrammar_unsupported_json_features(schema)
        grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema))
    except Exception as error:  # noqa: BLE001  # xgrammar raises what its C++ gives
        raise InvalidRequest(field, _reason(error)) from None
    if unsupported:
        raise InvalidRequest(field, "has features that xgrammar can't enforce (such as multipleOf or uniqueItems)")
    if excess := _excess(grammar):
        raise InvalidRequest(field, excess)
    return {"structured_outputs": {"json": schema}}


def _excess(grammar: xgrammar.Grammar) -> str | None:
    """Why the engine is not to compile it; None where it may."""
    rules = str(grammar)
    return too_much(rules) or too_much_in_patterns(rules)


def _reason(error: Exception) -> str:
    """xgrammar's message without the C++ source position in front."""
    text = re.sub(r"^\[[^\]]*\]\s*\S+:\d+:\s*", "", str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__
