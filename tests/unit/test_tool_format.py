import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from common.tool_format import CALLS, TEXT, conversation, tool_format

Calls = Sequence[tuple[str, str, dict[str, str]]]


def chatml(body: str) -> str:
    return f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{body}<|im_end|>\n"


def hermes(calls: Calls) -> str:
    return chatml(
        "\n".join(
            f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
            for _, name, arguments in calls
        )
    )


def mistral(calls: Calls) -> str:
    written = ", ".join(
        f'{{"name": "{name}", "arguments": {json.dumps(arguments)}, "id": "{call_id}"}}'
        for call_id, name, arguments in calls
    )
    return f"[INST] Hi[/INST][TOOL_CALLS] [{written}]</s>"


def qwen3_coder(calls: Calls) -> str:
    def arguments_of(arguments: dict[str, str]) -> str:
        return "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())

    return chatml(
        "\n".join(
            f"<tool_call>\n<function={name}>\n{arguments_of(arguments)}</function>\n</tool_call>"
            for _, name, arguments in calls
        )
    )


def deepseek(calls: Calls) -> str:
    written = "\n".join(
        f"<call>function<sep>{name}\n```json\n{json.dumps(arguments)}\n```</call>" for _, name, arguments in calls
    )
    return f"<user>Hi<assistant><calls>{written}</calls><eos>"


def nested(calls: Calls) -> str:
    return "A:" + "".join(
        json.dumps({"id": call_id, "function": {"name": name, "arguments": json.dumps(arguments)}})
        for call_id, name, arguments in calls
    )


def keyed(calls: Calls) -> str:
    return chatml("".join(json.dumps({name: arguments}) for _, name, arguments in calls))


EXPECTED: list[tuple[Callable[[Calls], str], str, dict[str, Any]]] = [
    (
        hermes,
        chatml(TEXT),
        {
            "format_type": "json_native",
            "per_call_start": "<tool_call>\n",
            "per_call_end": "\n</tool_call>",
            "name_field": "name",
            "args_field": "arguments",
            "parameter_order": ["name", "arguments"],
        },
    ),
    (
        mistral,
        f"[INST] Hi[/INST]{TEXT}</s>",
        {
            "format_type": "json_native",
            "section_start": "[TOOL_CALLS] ",
            "tools_array_wrapped": True,
            "name_field": "name",
            "args_field": "arguments",
            "id_field": "id",
            "parameter_order": ["name", "arguments", "id"],
        },
    ),
    (
        qwen3_coder,
        chatml(TEXT),
        {
            "format_type": "tag_with_tagged",
            "func_name_prefix": "<tool_call>\n<function=",
            "func_name_suffix": ">",
            "arg_name_prefix": "\n<parameter=",
            "arg_name_suffix": ">\n",
            "arg_value_suffix": "\n</parameter>",
            "func_close": "\n</function>\n</tool_call>",
        },
    ),
    (
        deepseek,
        f"<user>Hi<assistant>{TEXT}<eos>",
        {
            "format_type": "tag_with_json",
            "section_start": "<calls>",
            "section_end": "</calls>",
            "func_name_prefix": "<call>function<sep>",
            "func_name_suffix": "\n```json\n",
            "func_close": "\n```</call>",
        },
    ),
    (
        nested,
        f"A:{TEXT}",
        {
            "format_type": "json_native",
            "function_field": "function",
            "name_field": "name",
            "args_field": "arguments",
            "id_field": "id",
            "parameter_order": ["name", "arguments"],
        },
    ),
    (keyed, chatml(TEXT), {"format_type": "json_native", "fun_name_is_key": True}),
]


@pytest.mark.parametrize(("template", "text", "expected"), EXPECTED, ids=[case[0].__name__ for case in EXPECTED])
def test_known_families(template: Callable[[Calls], str], text: str, expected: dict[str, Any]) -> None:
    found = tool_format(text, template(CALLS[:1]), template(CALLS))
    assert {field: value for field, value in found.items() if value} == expected


def test_a_template_of_one_call_at_a_time() -> None:
    found = tool_format(chatml(TEXT), hermes(CALLS[:1]), "")
    assert (found["per_call_start"], found["per_call_end"]) == ("<tool_call>\n", "\n</tool_call>")


@pytest.mark.parametrize("one", ["", chatml(""), chatml("I called a function.")])
def test_a_template_that_shows_no_calls(one: str) -> None:
    assert tool_format(chatml(TEXT), one, one) == {}


def test_the_chats_that_are_rendered() -> None:
    assert conversation(0)[-1] == {"role": "assistant", "content": TEXT}
    (call,) = conversation(1)[-1]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == CALLS[0][2]
    assert len(conversation(2)[-1]["tool_calls"]) == 2
