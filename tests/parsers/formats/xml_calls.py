"""Families that write a call as elements: one for the call, one for each argument."""

# ruff: noqa: RUF001  # DeepSeek and Step write their markers with a full-width bar
from collections.abc import Sequence
from typing import Any

from tests.parsers.cases import Call, Format
from tests.parsers.formats.writing import NO_THINKING, THINK, THINKING, TOOL_CALL, functions, parameters, text

_ARGUMENTS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


def _qwen3_coder(calls: Sequence[Call]) -> str:
    return functions(calls, *TOOL_CALL)


def _glm(calls: Sequence[Call]) -> str:
    return parameters(
        calls,
        call="<tool_call>{name}",
        parameter="<arg_key>{key}</arg_key><arg_value>",
        parameter_end="</arg_value>",
        end="</tool_call>",
    )


def _glm45(calls: Sequence[Call]) -> str:
    return parameters(
        calls,
        call="<tool_call>{name}\n",
        parameter="<arg_key>{key}</arg_key>\n<arg_value>",
        parameter_end="</arg_value>\n",
        end="</tool_call>",
        between="\n",
    )


def _hy_v3(calls: Sequence[Call]) -> str:
    written = parameters(
        calls,
        call="<tool_call>{name}<tool_sep>\n",
        parameter="<arg_key>{key}</arg_key>\n<arg_value>",
        parameter_end="</arg_value>\n",
        end="</tool_call>\n",
    )
    return f"<tool_calls>\n{written}</tool_calls>"


def _dsml(calls: Sequence[Call], outer: str, space: str = "") -> str:
    def attributes(key: str, value: Any) -> str:
        return f'name="{key}" string="{"true" if isinstance(value, str) else "false"}"'

    tag = f"｜DSML｜{space}"
    written = "".join(
        f'<{tag}invoke name="{name}">\n'
        + "".join(f"<{tag}parameter {attributes(k, v)}>{text(v)}</{tag}parameter>\n" for k, v in arguments.items())
        + f"</{tag}invoke>\n"
        for name, arguments in calls
    )
    return f"<{tag}{outer}>\n{written}</{tag}{outer}>"


def _invokes(calls: Sequence[Call], opened: str, closed: str) -> str:
    written = parameters(
        calls,
        call='<invoke name="{name}">\n',
        parameter='<parameter name="{key}">',
        parameter_end="</parameter>\n",
        end="</invoke>\n",
    )
    return f"{opened}\n{written}{closed}"


_NAMESPACE = "]<]minimax[>["


def _minimax_m3_value(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(_minimax_m3_element(key, given) for key, given in value.items())
    if isinstance(value, list):
        return "".join(_minimax_m3_element("item", given) for given in value)
    return text(value)


def _minimax_m3_element(name: str, value: Any) -> str:
    return f"{_NAMESPACE}<{name}>{_minimax_m3_value(value)}{_NAMESPACE}</{name}>"


def _minimax_m3(calls: Sequence[Call]) -> str:
    written = "".join(
        f'{_NAMESPACE}<invoke name="{name}">'
        + "".join(_minimax_m3_element(key, value) for key, value in arguments.items())
        + f"{_NAMESPACE}</invoke>\n"
        for name, arguments in calls
    )
    return f"{_NAMESPACE}<tool_call>\n{written}{_NAMESPACE}</tool_call>"


def _step3(calls: Sequence[Call]) -> str:
    written = parameters(
        calls,
        call='<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{name}">',
        parameter='<steptml:parameter name="{key}">',
        parameter_end="</steptml:parameter>",
        end="</steptml:invoke><｜tool_call_end｜>",
    )
    return f"<｜tool_calls_begin｜>{written}<｜tool_calls_end｜>"


def _ifm(calls: Sequence[Call]) -> str:
    written = parameters(
        calls,
        call="<ifm|tool_call>{name}",
        parameter="<ifm|arg_key>{key}</ifm|arg_key><ifm|arg_value>",
        parameter_end="</ifm|arg_value>",
        end="</ifm|tool_call>",
    )
    return f"<ifm|tool_calls>{written}</ifm|tool_calls>"


def _xtml(calls: Sequence[Call]) -> str:
    kinds = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    written = "".join(
        f'<|open|>call tool="{name}" index="{index}"<|sep|>'
        + "".join(
            f'<|open|>argument key="{key}" type="{kinds[type(value)]}"<|sep|>{text(value)}<|close|>argument<|sep|>'
            for key, value in arguments.items()
        )
        + "<|close|>call<|sep|>"
        for index, (name, arguments) in enumerate(calls)
    )
    return f"<|open|>tools<|sep|>{written}<|close|>tools<|sep|>"


def _atem(calls: Sequence[Call]) -> str:
    return "".join(
        f" to={name}<|message|>"
        + parameters(
            [(name, arguments)],
            call='<atem:function_calls>\n<atem:invoke name="{name}">\n',
            parameter='<atem:parameter name="{key}">',
            parameter_end="</atem:parameter>\n",
            end="</atem:invoke>\n</atem:function_calls>",
        )
        + ("<|eom|><|start|>assistant" if index < len(calls) - 1 else "")
        for index, (name, arguments) in enumerate(calls)
    )


_QWEN: dict[str, Any] = {
    "added": (*TOOL_CALL, *THINK),
    "prompt": "hello\n<think>\n\n</think>\n\n",
    "thinking_prompt": "hello\n<think>\n",
    "kwargs": NO_THINKING,
    "thinking_kwargs": THINKING,
    "calls": _qwen3_coder,
    "before": "\n\n",
    "think": "{}\n</think>\n\n".format,
}
_MINIMAX_TAGS = tuple(f"<{slash}{name}>" for name in ("minimax:tool_call", "think") for slash in ("", "/"))
_IFM_TAGS = tuple(
    f"<{slash}ifm|{name}>"
    for name in ("tool_calls", "tool_call", "arg_key", "arg_value", "arg_type", "think", "think_fast", "think_faster")
    for slash in ("", "/")
)
_HY_TAGS = (*TOOL_CALL, *THINK, *_ARGUMENTS, "<tool_calls>", "</tool_calls>", "<tool_sep>")

FORMATS = (
    Format(tool=("qwen3_coder", "qwen3_xml"), reasoning=("nemotron_v3", "minicpmv"), **_QWEN),
    Format(
        reasoning=("granite_thinking_parser",),
        tool_partner="qwen3_coder",
        **_QWEN | {"think": "{}\n</think>\n".format},
    ),
    Format(
        tool=("mimo",),
        reasoning=("mimo",),
        **_QWEN | {"calls": lambda calls: functions(calls, *TOOL_CALL, newline=""), "think": "{}</think>".format},
    ),
    Format(
        tool=("step3p5",),
        reasoning=("step3p5",),
        **_QWEN
        | {"prompt": "hello\n<think>\n", "think": "{}\n</think>\n".format, "no_thought": "\n</think>\n", "kwargs": {}},
    ),
    Format(
        tool=("seed_oss",),
        reasoning=("seed_oss",),
        added=("<seed:tool_call>", "</seed:tool_call>", "<seed:think>", "</seed:think>"),
        calls=lambda calls: functions(calls, "<seed:tool_call>", "</seed:tool_call>", newline=""),
        before="\n",
        kwargs=NO_THINKING,
        think="<seed:think>\n{}\n</seed:think>".format,
    ),
    Format(
        tool=("glm45", "glm47"),
        reasoning=("glm45", "glm47"),
        added=(*TOOL_CALL, *THINK, *_ARGUMENTS),
        prompt="hello<|assistant|></think>",
        thinking_prompt="hello<|assistant|><think>",
        special=("<|user|>", "<|assistant|>"),
        kwargs=NO_THINKING,
        calls=_glm,
        think="{}</think>".format,
    ),
    Format(
        tool=("ling3",),
        reasoning=("ling3",),
        added=(*TOOL_CALL, *THINK, *_ARGUMENTS),
        prompt="hello</think>",
        thinking_prompt="hello<think>",
        kwargs=NO_THINKING,
        calls=_glm45,
        before="\n",
        think="\n{}\n</think>\n".format,
    ),
    Format(
        tool=("poolside_v1",),
        reasoning=("poolside_v1",),
        special=(*TOOL_CALL, *_ARGUMENTS, "<assistant>"),
        added=THINK,
        prompt="hello<assistant></think>",
        thinking_prompt="hello<assistant><think>",
        thinking_kwargs=THINKING,
        calls=_glm45,
        before="\n",
        think="{}</think>".format,
    ),
    Format(
        tool=("hy_v3",),
        reasoning=("hy_v3",),
        added=_HY_TAGS,
        prompt="hello<think></think>",
        thinking_prompt="hello<think>",
        thinking_kwargs={"reasoning_effort": "high"},
        calls=_hy_v3,
        before="\n",
        think="{}</think>".format,
    ),
    Format(
        tool=("hy_v4",),
        reasoning=("hy_v4",),
        added=_HY_TAGS,
        prompt="hello<think></think>",
        thinking_prompt="hello<think>",
        kwargs={"reasoning_effort": "no_think"},
        calls=lambda calls: f"<tool_calls>{_glm(calls)}</tool_calls>",
        think="{}</think>".format,
    ),
    Format(
        tool=("deepseek_v32",),
        reasoning_partner="deepseek_v3",
        added=(*THINK, "｜DSML｜"),
        thinking_prompt="hello<think>",
        thinking_kwargs={"thinking": True},
        calls=lambda calls: _dsml(calls, "function_calls"),
        before="\n\n",
        before_calls="\n\n",
        think="{}</think>".format,
    ),
    Format(
        tool=("deepseek_v4",),
        reasoning=("deepseek_v4",),
        added=(*THINK, "｜DSML｜"),
        prompt="hello</think>",
        thinking_prompt="hello<think>",
        kwargs={"thinking": False},
        thinking_kwargs={"thinking": True},
        calls=lambda calls: _dsml(calls, "tool_calls"),
        before="\n\n",
        before_calls="\n\n",
        think="{}</think>".format,
    ),
    Format(
        tool=("deepseek_v41",),
        reasoning=("deepseek_v41",),
        added=(*THINK, "｜DSML｜"),
        prompt="hello</think>",
        thinking_prompt="hello<think>",
        kwargs={"thinking": False},
        thinking_kwargs={"thinking": True},
        calls=lambda calls: _dsml(calls, "calls", " "),
        before="\n\n",
        before_calls="\n\n",
        think="{}</think>".format,
    ),
    Format(
        tool=("minimax_m2",),
        reasoning=("minimax_m2",),
        added=_MINIMAX_TAGS,
        prompt="hello\n<think>\n",
        thinking_prompt="hello\n<think>\n",
        calls=lambda calls: _invokes(calls, "<minimax:tool_call>", "</minimax:tool_call>"),
        before="\n",
        think="{}\n</think>\n\n".format,
        no_thought="\n</think>\n\n",
    ),
    Format(
        reasoning=("minimax_m2_append_think",),
        tool_partner="minimax_m2",
        added=_MINIMAX_TAGS,
        thinking_prompt="hello\n<think>\n",
        calls=lambda calls: _invokes(calls, "<minimax:tool_call>", "</minimax:tool_call>"),
        before="\n",
        think="{}\n</think>\n\n".format,
        apart=False,
    ),
    Format(
        tool=("minimax_m3",),
        reasoning=("minimax_m3",),
        added=(_NAMESPACE, "<mm:think>", "</mm:think>"),
        calls=_minimax_m3,
        before="\n",
        think="<mm:think>{}</mm:think>".format,
    ),
    Format(
        tool=("dots",),
        calls=lambda calls: _invokes(calls, "<dots_function_call>", "</dots_function_call>"),
        before="\n",
    ),
    Format(
        tool=("minicpm5",),
        special=("<function", "</function>", "<param", "</param>"),
        calls=lambda calls: parameters(
            calls,
            call='<function name="{name}">',
            parameter='<param name="{key}">',
            parameter_end="</param>",
            end="</function>",
            between="\n",
        ),
        before="\n",
    ),
    Format(
        tool=("step3",),
        reasoning=("step3",),
        special=tuple(f"<｜{name}｜>" for name in ("tool_calls_begin", "tool_calls_end", "tool_call_begin")),
        added=("<｜tool_call_end｜>", "<｜tool_sep｜>", *THINK),
        prompt="hello\n<think>\n",
        thinking_prompt="hello\n<think>\n",
        calls=_step3,
        before="\n",
        think="{}\n</think>\n\n".format,
        no_thought="\n</think>\n\n",
    ),
    Format(
        tool=("k2_horizon",),
        reasoning=("k2_horizon",),
        added=_IFM_TAGS,
        prompt="hello\n<ifm|think>",
        thinking_prompt="hello\n<ifm|think>",
        calls=_ifm,
        think="{}</ifm|think>".format,
        no_thought="</ifm|think>",
    ),
    Format(
        tool=("kimi_k3",),
        reasoning=("kimi_k3",),
        special=("<|open|>", "<|close|>", "<|sep|>"),
        prompt="hello",
        thinking_prompt="hello<|open|>think<|sep|>",
        kwargs={"thinking": False},
        calls=lambda calls: _xtml(calls) + "<|close|>message<|sep|>",
        answer="<|open|>response<|sep|>{}<|close|>response<|sep|>".format,
        think="{}<|close|>think<|sep|>".format,
    ),
    Format(
        tool=("muse_glimmer",),
        reasoning=("muse_glimmer",),
        special=("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
        prompt="hello<|eot|><|start|>assistant",
        thinking_prompt="hello<|eot|><|start|>assistant",
        calls=_atem,
        answer=" to=user<|message|>{}".format,
        before="<|eom|><|start|>assistant",
        think=" to=self<|message|>{}<|eom|><|start|>assistant".format,
    ),
)
