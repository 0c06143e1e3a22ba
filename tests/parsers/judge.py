"""What is wrong with an outcome, in few words."""

import dataclasses
import json
from typing import Any

from tests.parsers.cases import Case
from tests.parsers.feed import Outcome


def faults(case: Case, outcome: Outcome) -> str:
    """Everything wrong with `outcome`; empty where it says what `case` says.

    White space around texts and inside JSON is no matter. A call that the limit of tokens has cut may be left out, or
    come as far as it got, which is all that a stream can do.
    """
    if outcome.error:
        return "an error instead of the answer"
    if case.either and not _text_fault("", case.content, outcome.reasoning):
        case = dataclasses.replace(case, content="", reasoning=case.content)
    found = [
        _text_fault("the text", case.content, outcome.content),
        _text_fault("the reasoning", case.reasoning, outcome.reasoning),
        _cut_call_fault(outcome) if case.cut and case.calls else _call_fault(case, outcome),
    ]
    return "; ".join(filter(None, found))


def same_but_for_white_space(left: Outcome, right: Outcome) -> bool:
    """Whether two right outcomes differ in white space around their texts."""
    return (left.content, left.reasoning) != (right.content, right.reasoning)


def same_place(left: Outcome, right: Outcome) -> bool:
    """Whether two right outcomes have the text in the same place."""
    return bool(left.reasoning) == bool(right.reasoning)


def _text_fault(what: str, expected: str, got: str) -> str:
    expected, got = expected.strip(), got.strip()
    if got == expected:
        return ""
    if not got:
        return f"{what} is lost"
    if expected in got:
        return f"{what} has more than belongs there: {_excerpt(got.replace(expected, '…', 1) if expected else got)}"
    return f"{what} is wrong: {_excerpt(got)}"


def _cut_call_fault(outcome: Outcome) -> str:
    if not outcome.calls:
        return ""
    (name, arguments), *more = outcome.calls
    # Some close the JSON that the limit left open.
    begun = "".join(arguments.split()).removesuffix("}").removesuffix('"')
    if name == "get_weather" and not more and '{"city":"Par'.startswith(begun):
        return ""
    return f"the cut call is wrong: {_calls(outcome)}"


def _call_fault(case: Case, outcome: Outcome) -> str:
    if tuple((name, _parsed(arguments)) for name, arguments in outcome.calls) == case.calls:
        return ""
    if not outcome.calls:
        return "the call is lost" if len(case.calls) == 1 else "the calls are lost"
    return f"the calls are wrong: {_calls(outcome)}"


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return None


def _calls(outcome: Outcome) -> str:
    return _excerpt(", ".join(f"{name}({arguments})" for name, arguments in outcome.calls))


def _excerpt(text: str, limit: int = 90) -> str:
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    # Half a surrogate pair can not be written.
    shown = shown.encode(errors="backslashreplace").decode()
    return "`" + shown.replace("\n", "⏎").replace("`", "'") + "`"
