"""Families that write a call as JSON between markers."""

# ruff: noqa: RUF001  # DeepSeek and Step write their markers with a full-width bar
from collections.abc import Sequence

from tests.parsers.cases import Call, Format, dumps
from tests.parsers.formats.writing import NO_THINKING, THINK, THINKING, TOOL_CALL, array, objects


def _hermes(calls: Sequence[Call]) -> str:
    return objects(calls, "<tool_call>\n", "\n</tool_call>", "\n")


def _kimi_k2(calls: Sequence[Call]) -> str:
    written = "".join(
        f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>{dumps(arguments)}<|tool_call_end|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def _deepseek_v3(calls: Sequence[Call]) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call]) -> str:
    written = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(arguments)}<｜tool▁call▁end｜>" for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def _inkling(calls: Sequence[Call]) -> str:
    return "<|message_model|>".join(
        f"<|content_invoke_tool_json|>{dumps({'name': name, 'args': arguments})}<|end_message|>"
        for name, arguments in calls
    )


def _plamo(calls: Sequence[Call]) -> str:
    written = "".join(
        f"<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>{name}<|plamo:end_tool_name:plamo|>"
        "<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>"
        f"{dumps(arguments)}<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>"
        for name, arguments in calls
    )
    return f"<|plamo:begin_tool_requests:plamo|>{written}<|plamo:end_tool_requests:plamo|>"


# What a checkpoint's tokenizer declares of its own answers, for the parser that any such checkpoint can have.
_RESPONSE_TEMPLATE = {
    "version": 1,
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}
_DEEPSEEK = (*THINK, *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")))
_KIMI = (
    *(f"<|tool_calls_section_{end}|>" for end in ("begin", "end")),
    *(f"<|tool_call_{part}|>" for part in ("begin", "argument_begin", "end")),
)
# Hunyuan's reasoning parser knows these tokens by number.
_HUNYUAN_IDS = {"<th": 14023, "ink": 771, ">\n": 397, ">\n\n": 1363, "</": 524, "think": 27963, "answer": 9399}
_HUNYUAN_MERGES = (
    *(("<", "/"), ("<", "t"), ("<t", "h"), ("i", "n"), ("in", "k"), ("t", "h"), ("th", "ink"), (">", "\n")),
    *((">\n", "\n"), ("a", "n"), ("an", "s"), ("ans", "w"), ("answ", "e"), ("answe", "r")),
)

_COHERE = tuple(f"<|{end}_{part}|>" for part in ("THINKING", "RESPONSE", "TEXT", "ACTION") for end in ("START", "END"))


def _cohere(calls: Sequence[Call]) -> str:
    written = ",\n".join(
        "    " + dumps({"tool_call_id": str(index), "tool_name": name, "parameters": arguments})
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|START_ACTION|>[\n{written}\n]<|END_ACTION|>"


def _command(version: int, opened: str, closed: str) -> Format:
    return Format(
        tool=(f"cohere_command{version}",),
        reasoning=(f"cohere_command{version}",),
        special=("<|CHATBOT_TOKEN|>", *_COHERE),
        prompt="hello<|CHATBOT_TOKEN|>",
        thinking_prompt="hello<|CHATBOT_TOKEN|>",
        calls=_cohere,
        answer=f"{opened}{{}}{closed}".format,
        think="<|START_THINKING|>{}<|END_THINKING|>".format,
    )


FORMATS = (
    _command(3, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    _command(4, "<|START_TEXT|>", "<|END_TEXT|>"),
    Format(
        tool=("hermes", "qwen3_json"),
        reasoning=("qwen3",),
        added=(*TOOL_CALL, *THINK),
        prompt="hello\n<think>\n\n</think>\n\n",
        thinking_prompt="hello\n",
        kwargs=NO_THINKING,
        thinking_kwargs=THINKING,
        calls=_hermes,
        before="\n",
        think="<think>\n{}\n</think>\n\n".format,
    ),
    Format(
        reasoning=("holo2",),
        tool_partner="hermes",
        added=(*TOOL_CALL, *THINK),
        prompt="hello\n<think>\n\n</think>\n\n",
        thinking_prompt="hello\n<think>\n",
        kwargs=NO_THINKING,
        calls=_hermes,
        before="\n",
        think="{}\n</think>\n\n".format,
    ),
    Format(
        tool=("hf",),
        reasoning=("hf",),
        special=("<|im_start|>",),
        added=(*TOOL_CALL, *THINK),
        tokenizer={"attributes": {"response_template": _RESPONSE_TEMPLATE}},
        prompt="hello\n<|im_start|>assistant\n",
        thinking_prompt="hello\n<|im_start|>assistant\n",
        calls=_hermes,
        before="\n",
        think="<think>\n{}\n</think>\n\n".format,
    ),
    Format(
        tool=("longcat",),
        added=("<longcat_tool_call>", "</longcat_tool_call>"),
        calls=lambda calls: objects(calls, "<longcat_tool_call>\n", "\n</longcat_tool_call>", "\n"),
        before="\n",
    ),
    Format(
        tool=("ernie45",),
        reasoning=("ernie45",),
        added=(*TOOL_CALL, *THINK, "<response>", "</response>"),
        thinking_prompt="hello\n<think>\n",
        prompt="hello\n<think>\n",
        calls=lambda calls: objects(calls, "<tool_call>\n", "\n</tool_call>\n", "\n"),
        before="\n\n",
        before_calls="\n\n",
        think="{}\n</think>\n\n".format,
        no_thought="\n</think>\n\n",
        reply="<response>\n{}\n</response>\n".format,
    ),
    Format(
        tool=("granite4",),
        special=TOOL_CALL,
        calls=_hermes,
        before="\n",
    ),
    Format(
        tool=("granite",),
        reasoning=("granite",),
        special=("<|tool_call|>",),
        tokenizer={"first": (("H", "e"), ("He", "r"), ("Her", "e"))},
        thinking_kwargs={"thinking": True},
        calls=lambda calls: "<|tool_call|>" + array(calls),
        think="Here is my thought process: {}\n\n".format,
        reply="Here is my response: {}".format,
        before_calls="Here is my response: ",
    ),
    Format(
        tool=("granite-20b-fc",),
        calls=lambda calls: objects(calls, "<function_call> ", "", "\n"),
        before="\n",
    ),
    Format(
        tool=("hunyuan_a13b",),
        reasoning=("hunyuan_a13b",),
        tokenizer={"first": _HUNYUAN_MERGES, "ids": _HUNYUAN_IDS},
        calls=lambda calls: f"<tool_calls>{array(calls)}</tool_calls>",
        think="<think>\n{}\n</think>\n".format,
        no_thought="<think>\n\n</think>\n",
        reply="<answer>\n{}\n</answer>".format,
        lead="<answer>\n{}".format,
        before_calls="<answer>\n",
        after_calls="\n</answer>",
    ),
    Format(
        tool=("internlm",),
        special=("<|action_start|>", "<|action_end|>", "<|plugin|>"),
        calls=lambda calls: objects(calls, "<|action_start|><|plugin|>\n", "<|action_end|>", "", "parameters"),
        parallel=False,
        before="\n",
    ),
    Format(
        tool=("jamba",),
        special=("<tool_calls>", "</tool_calls>"),
        calls=lambda calls: "<tool_calls>[\n" + objects(calls, between=",\n") + "\n]</tool_calls>",
    ),
    Format(
        tool=("apertus",),
        special=("<|tools_prefix|>", "<|tools_suffix|>"),
        calls=lambda calls: f"<|tools_prefix|>{dumps([{name: given} for name, given in calls])}<|tools_suffix|>",
    ),
    Format(
        tool=("llama3_json", "llama4_json"),
        special=("<|python_tag|>",),
        calls=lambda calls: objects(calls, between="; ", arguments="parameters"),
        before="\n\n",
    ),
    Format(
        tool=("phi4_mini_json",),
        calls=lambda calls: "functools" + array(calls),
    ),
    Format(
        tool=("xlam",),
        calls=array,
        text_first=False,
    ),
    Format(
        tool=("xlam",),
        note="}}] one token",
        tokenizer={"first": (("}", "}"), ("}}", "]"))},
        calls=array,
        text_first=False,
    ),
    Format(
        tool=("gigachat3",),
        special=("<|function_call|>", "<|role_sep|>", "<|message_sep|>"),
        calls=lambda calls: objects(calls, "<|function_call|>"),
        parallel=False,
    ),
    Format(
        tool=("kimi_k2",),
        reasoning=("kimi_k2",),
        special=_KIMI,
        added=THINK,
        prompt="hello\n<think></think>",
        thinking_prompt="hello\n<think>",
        kwargs={"thinking": False},
        calls=_kimi_k2,
        think="{}</think>".format,
    ),
    Format(
        reasoning=("kimi_k2",),
        note="Kimi K2 Thinking",
        tool_partner="kimi_k2",
        special=_KIMI,
        added=THINK,
        calls=_kimi_k2,
        think="<think>{}</think>".format,
        no_thought="<think></think>",
    ),
    Format(
        tool=("deepseek_v3",),
        reasoning=("deepseek_r1",),
        added=_DEEPSEEK,
        prompt="hello\n<think>\n",
        thinking_prompt="hello\n<think>\n",
        calls=_deepseek_v3,
        think="{}\n</think>\n\n".format,
        no_thought="\n</think>\n\n",
    ),
    Format(
        reasoning=("deepseek_r1",),
        note="Phi-4-reasoning",
        added=THINK,
        think="<think>{}</think>".format,
        no_thought="<think></think>",
    ),
    Format(
        tool=("deepseek_v31",),
        reasoning=("deepseek_v3",),
        added=_DEEPSEEK,
        prompt="hello\n</think>",
        thinking_prompt="hello\n<think>",
        thinking_kwargs={"thinking": True},
        calls=_deepseek_v31,
        think="{}</think>".format,
    ),
    Format(
        tool=("inkling",),
        reasoning=("inkling",),
        special=(
            *(f"<|content_{kind}|>" for kind in ("text", "thinking", "invoke_tool_json", "invoke_tool_text")),
            *("<|content_tool_error|>", "<|content_model_end_sampling|>", "<|message_model|>", "<|end_message|>"),
        ),
        prompt="hello<|end_message|><|message_model|>",
        thinking_prompt="hello<|end_message|><|message_model|>",
        calls=_inkling,
        answer="<|content_text|>{}<|end_message|>".format,
        before="<|message_model|>",
        think="<|content_thinking|>{}<|end_message|><|message_model|>".format,
    ),
    Format(
        tool=("plamo3",),
        reasoning=("plamo3",),
        special=("<|plamo:begin_", "<|plamo:end_", ":plamo|>", "<|plamo:tag|>"),
        kwargs=NO_THINKING,
        thinking_prompt="hello\n<|plamo:begin_think:plamo|>",
        calls=_plamo,
        think="{}<|plamo:end_think:plamo|>".format,
    ),
)
