"""Families that write a call in Python, or in a notation of their own."""

from collections.abc import Sequence
from typing import Any

from tests.parsers.cases import Call, Format, dumps
from tests.parsers.formats.writing import NO_THINKING, THINKING, array, python_or_json, pythonic


def _gemma_value(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_gemma_value(given, quote)}" for key, given in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_gemma_value(given, quote) for given in value) + "]"
    return dumps(value)


def _gemma(calls: Sequence[Call], opened: str, closed: str, quote: str) -> str:
    return "".join(f"{opened}call:{name}{_gemma_value(arguments, quote)}{closed}" for name, arguments in calls)


def _list(calls: Sequence[Call]) -> str:
    return f"[{pythonic(calls)}]"


def _harmony(calls: Sequence[Call]) -> str:
    return "".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(arguments)}<|call|>"
        for name, arguments in calls
    )


_GEMMA4 = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|turn>", "<turn|>", "<|think|>")

FORMATS = (
    Format(
        tool=("openai",),
        reasoning=("openai_gptoss",),
        tokenizer={"harmony": True},
        model_type="gpt_oss",
        stops=("<|return|>", "<|call|>"),
        calls=_harmony,
        parallel=False,
        answer="<|channel|>final<|message|>{}<|return|>".format,
        opening="<|channel|>commentary<|message|>{}<|end|><|start|>assistant".format,
        lead="<|channel|>commentary<|message|>{}<|end|><|start|>assistant".format,
        think="<|channel|>analysis<|message|>{}<|end|><|start|>assistant".format,
    ),
    Format(tool=("pythonic",), calls=_list, text_first=False),
    Format(
        tool=("llama4_pythonic",),
        special=("<|python_start|>", "<|python_end|>"),
        calls=lambda calls: f"<|python_start|>{_list(calls)}<|python_end|>",
        text_first=False,
    ),
    Format(
        tool=("lfm2",),
        special=("<|tool_call_start|>", "<|tool_call_end|>"),
        calls=lambda calls: f"<|tool_call_start|>{_list(calls)}<|tool_call_end|>",
    ),
    Format(
        tool=("olmo3",),
        reasoning=("olmo3",),
        # Its reasoning parser looks for the tokens that `</think>` falls into.
        tokenizer={
            "first": ((" ", "<"), (" <", "/"), ("<", "/"), ("t", "h"), ("th", "i"), ("thi", "n"), ("thin", "k")),
            "without": ("><", ">\n"),
        },
        prompt="hello\n<think>",
        thinking_prompt="hello\n<think>",
        no_thought="</think>",
        calls=lambda calls: f"<function_calls>{pythonic(calls, chr(10), python_or_json)}</function_calls>",
        text_first=False,
        think="{}</think>".format,
    ),
    Format(
        tool=("functiongemma",),
        special=("<start_function_call>", "<end_function_call>", "<escape>"),
        calls=lambda calls: _gemma(calls, "<start_function_call>", "<end_function_call>", "<escape>"),
    ),
    Format(
        tool=("gemma4",),
        reasoning=("gemma4",),
        special=_GEMMA4,
        kwargs=NO_THINKING,
        thinking_kwargs=THINKING,
        calls=lambda calls: _gemma(calls, "<|tool_call>", "<tool_call|>", '<|"|>'),
        think="<|channel>thought\n{}\n<channel|>".format,
    ),
    Format(
        reasoning=("gemma4",),
        note="prompt opens the thought",
        tool_partner="gemma4",
        special=_GEMMA4,
        prompt="hello\n<|channel>thought\n",
        thinking_prompt="hello\n<|channel>thought\n",
        default_prompt="hello\n<|channel>thought\n",
        thinking_kwargs=THINKING,
        calls=lambda calls: _gemma(calls, "<|tool_call>", "<tool_call|>", '<|"|>'),
        think="{}\n<channel|>".format,
        no_thought="\n<channel|>",
    ),
    Format(
        tool=("mistral",),
        note="before v11",
        tokenizer={"tekken": "tekken_240911.json"},
        special=("[TOOL_CALLS]",),
        calls=lambda calls: "[TOOL_CALLS]" + array(calls),
    ),
    Format(
        tool=("mistral",),
        reasoning=("mistral",),
        special=("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"),
        calls=lambda calls: "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(arguments)}" for name, arguments in calls),
        think="[THINK]{}[/THINK]".format,
    ),
)
