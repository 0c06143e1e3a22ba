"""Each family is a tiny tokenizer with the family's own tokens, and a template with its own markers."""
# ruff: noqa: RUF001  # DeepSeek writes its markers with such bars

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import mistral_common
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser.parser_manager import ParserManager
from vllm.tokenizers.mistral import MistralTokenizer

from common.errors import InvalidRequest
from common.parsers import (
    ParserChoice,
    _harm,
    choose_parsers,
    families,
    reasoning_parser_names,
    tool_parser_names,
)
from tests.parsers.cases import WEATHER, Case, Format
from tests.parsers.feed import Bench
from tests.parsers.formats import FORMATS
from tests.parsers.judge import faults
from tests.parsers.matrix import CELLS, known

ASSISTANT = "<|im_start|>assistant\n"
OPEN = f"{ASSISTANT}<think>\n"
SWITCH = ASSISTANT + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
CUT = "{% if '</think>' in m.content %}{% set _ = m.content.split('</think>')[-1] %}{% endif %}"
ON_REQUEST = "<｜Assistant｜>{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}"
THINK = ("<think>", "</think>")

JSON_CALL = '<tool_call>{"name": "", "arguments": {}}</tool_call>'
XML_CALL = "<tool_call><function=f><parameter=p>v</parameter></function></tool_call>"
GLM_CALL = "<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>"
LLAMA_CALL = '{"name": function name, "parameters": dictionary of argument name and its value}'
COHERE_TOKENS = ("<|START_THINKING|>", "<|END_THINKING|>", "<|CHATBOT_TOKEN|>")
DEEPSEEK_TOOLS = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")

# What it says of tools, what it does to earlier messages, and how it begins an answer.
OUTLINE = """\
{%% if tools %%}{%% raw %%}%s{%% endraw %%}{%% endif %%}
{%%- for m in messages %%}%s<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A model as it shows itself: what its template says about tools, how answers begin, its tokens, its type."""

    call: str
    tool: str | None
    reasoning: str | None
    tokens: tuple[str, ...] = ()
    answer: str = ASSISTANT
    history: str = ""
    model_type: str = "llama"
    architecture: str = "LlamaForCausalLM"
    mode: str = "auto"
    pieces: tuple[tuple[str, int], ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizer(OUTLINE % (self.call, self.history, self.answer), self.tokens, dict(self.pieces))

    def config(self) -> Any:
        return config(self.model_type, self.architecture, self.mode)


def tokenizer(
    template: str | None, tokens: tuple[str, ...] = (), pieces: dict[str, int] | None = None
) -> PreTrainedTokenizerFast:
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | (pieces or {}), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", *tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def config(model_type: str = "llama", architecture: str = "LlamaForCausalLM", mode: str = "auto") -> Any:
    return SimpleNamespace(
        model="models/any",
        tokenizer="models/any",
        tokenizer_mode=mode,
        tokenizer_revision=None,
        code_revision=None,
        trust_remote_code=False,
        hf_config=SimpleNamespace(model_type=model_type, architectures=[architecture]),
        hf_text_config=SimpleNamespace(model_type=model_type),
    )


def choose(shown: Shown, tool_parser: str | None = None, reasoning_parser: str | None = None) -> ParserChoice:
    return choose_parsers(shown.config(), shown.tokenizer(), tool_parser=tool_parser, reasoning_parser=reasoning_parser)


FAMILIES = {
    "Qwen2.5": Shown(JSON_CALL, "hermes", None, model_type="qwen2"),
    "QwQ": Shown(JSON_CALL, "hermes", "deepseek_r1", THINK, OPEN, CUT, model_type="qwen2"),
    "Qwen3": Shown(JSON_CALL, "hermes", "qwen3", THINK, SWITCH, CUT, model_type="qwen3"),
    "Qwen3-Thinking-2507": Shown(JSON_CALL, "hermes", "deepseek_r1", THINK, OPEN, CUT, model_type="qwen3"),
    "Qwen3-Instruct-2507": Shown(JSON_CALL, "hermes", None, THINK, model_type="qwen3"),
    "Qwen3-Coder": Shown(XML_CALL, "qwen3_coder", None, THINK, model_type="qwen3_moe"),
    "Qwen3.5": Shown(XML_CALL, "qwen3_coder", "qwen3", THINK, SWITCH, model_type="qwen3_5"),
    "Holo2": Shown(
        JSON_CALL,
        "hermes",
        "holo2",
        THINK,
        ASSISTANT + "<think>\n{% if thinking is defined and not thinking %}\n</think>\n{% endif %}",
        model_type="qwen3_vl",
    ),
    "SmolLM2": Shown("", None, None),
    "SmolLM3": Shown(JSON_CALL, "hermes", "qwen3", THINK, SWITCH, model_type="smollm3"),
    "DeepSeek-V3": Shown(
        f"{DEEPSEEK_TOOLS[0]}f\n```json",
        "deepseek_v3",
        None,
        DEEPSEEK_TOOLS,
        "<｜Assistant｜>",
        model_type="deepseek_v3",
    ),
    "DeepSeek-R1-0528": Shown(
        f"{DEEPSEEK_TOOLS[0]}f\n```json",
        "deepseek_v3",
        "deepseek_r1",
        (*DEEPSEEK_TOOLS, *THINK),
        "<｜Assistant｜>",
        CUT,
        model_type="deepseek_v3",
    ),
    "DeepSeek-R1-Distill-Qwen": Shown(
        f"{DEEPSEEK_TOOLS[0]}f\n```json",
        None,
        "deepseek_r1",
        THINK,
        "<｜Assistant｜><think>\n",
        CUT,
        model_type="qwen2",
    ),
    "DeepSeek-V3.1": Shown(
        DEEPSEEK_TOOLS[0],
        "deepseek_v31",
        "deepseek_v3",
        (*DEEPSEEK_TOOLS, *THINK),
        ON_REQUEST,
        model_type="deepseek_v3",
    ),
    # vLLM writes the prompts of these, so their templates, if any, mean nothing.
    "DeepSeek-V3.2": Shown(JSON_CALL, "deepseek_v32", "deepseek_v3", THINK, mode="deepseek_v32"),
    "DeepSeek-V4": Shown("", "deepseek_v4", "deepseek_v4", THINK, mode="deepseek_v4"),
    "DeepSeek-V4.1": Shown("", "deepseek_v41", "deepseek_v41", THINK, mode="deepseek_v41"),
    "DSML, V3.2's": Shown("<｜DSML｜function_calls>", "deepseek_v32", "qwen3", THINK, SWITCH),
    "DSML, V4's": Shown("<｜DSML｜tool_calls>", "deepseek_v4", None),
    "DSML, V4.1's": Shown("<｜DSML｜ calls>", "deepseek_v41", None),
    "Kimi-K2-Instruct": Shown(
        "<|tool_calls_section_begin|>", "kimi_k2", None, ("<|tool_calls_section_begin|>", *THINK), model_type="kimi_k2"
    ),
    "Kimi-K2-Thinking": Shown(
        "<|tool_calls_section_begin|>",
        "kimi_k2",
        "kimi_k2",
        ("<|tool_calls_section_begin|>", *THINK),
        history="<think></think>",
        model_type="kimi_k2",
    ),
    "Kimi-K3": Shown(
        "", "kimi_k3", "kimi_k3", ("<|open|>", "<|close|>", "<|sep|>"), mode="kimi_k3", model_type="kimi_k3"
    ),
    "Kimi-K3, a template": Shown(
        "<|open|>tools<|sep|><|close|>tools<|sep|>",
        "kimi_k3",
        "kimi_k3",
        ("<|open|>", "<|close|>", "<|sep|>"),
        "<|open|>think<|sep|>",
    ),
    "Inkling": Shown("", "inkling", "inkling", ("<|content_thinking|>", "<|end_message|>"), mode="inkling"),
    "gpt-oss": Shown(JSON_CALL, "openai", "openai_gptoss", model_type="gpt_oss"),
    "Mistral, as HF": Shown("[TOOL_CALLS]", "mistral", None, ("[TOOL_CALLS]", "[THINK]", "[/THINK]")),
    "Magistral, as HF": Shown(
        "[TOOL_CALLS]", "mistral", "mistral", ("[TOOL_CALLS]", "[THINK]", "[/THINK]"), history="[THINK][/THINK]"
    ),
    "Gemma 3": Shown("", None, None, model_type="gemma3"),
    "Gemma 3, pythonic": Shown("[func_name1(params_name1=params_value1)]", "pythonic", None, model_type="gemma3"),
    "Gemma 4": Shown(
        "<|tool_call>call:f{}<tool_call|>",
        "gemma4",
        "gemma4",
        ("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>"),
        ASSISTANT + "<|channel>thought",
        model_type="gemma4",
    ),
    "FunctionGemma": Shown("<start_function_call>call:f{}", "functiongemma", None, model_type="gemma3_text"),
    "Llama 3.1": Shown(LLAMA_CALL + "<|start_header_id|>", "llama3_json", None, ("<|python_tag|>",)),
    "Llama 4, JSON": Shown(LLAMA_CALL + "<|header_start|>", "llama4_json", None, ("<|python_tag|>",)),
    "Llama 4": Shown("<|header_start|>[func_name1(param1=value1)]", "llama4_pythonic", None, model_type="llama4"),
    "Llama 3.1 Nemotron Nano": Shown("<TOOLCALL>", None, None, (), ASSISTANT, CUT),
    "Llama with ChatML": Shown(JSON_CALL, "hermes", None),
    "ToolACE": Shown("[func_name1(params_name1=params_value1)]", "pythonic", None),
    "xLAM-2": Shown("developed by Salesforce xLAM team", "xlam", None),
    "Nemotron 3": Shown(XML_CALL, "qwen3_coder", "nemotron_v3", THINK, SWITCH, model_type="nemotron_h"),
    "Granite 3.1": Shown("<|start_of_role|><|tool_call|>", "granite", None, ("<|tool_call|>",), model_type="granite"),
    "Granite 3.3": Shown(
        "<|start_of_role|><|tool_call|>", "granite", None, ("<|tool_call|>",), OPEN, model_type="granite"
    ),
    "Granite 4": Shown("<|start_of_role|>" + JSON_CALL, "granite4", None, model_type="granitemoehybrid"),
    "Granite 4.2": Shown(
        "<|start_of_role|>" + XML_CALL, "qwen3_coder", "granite_thinking_parser", THINK, SWITCH, model_type="granite"
    ),
    "Granite 20B functions": Shown('<function_call> {"name"', "granite-20b-fc", None, model_type="gpt_bigcode"),
    "GLM-4": Shown("", None, None, model_type="glm4"),
    "GLM-4.5": Shown(GLM_CALL, "glm45", "glm45", THINK, SWITCH, model_type="glm4_moe"),
    "GLM-4.5 without thoughts": Shown(GLM_CALL, "glm45", None, THINK, model_type="glm4_moe"),
    "Ling 3": Shown(GLM_CALL, "ling3", "ling3", THINK, SWITCH, architecture="BailingMoeV3ForCausalLM"),
    "Laguna": Shown(
        GLM_CALL, "poolside_v1", "poolside_v1", (*THINK, "<assistant>"), "<assistant><think>", model_type="laguna"
    ),
    "Hy3": Shown(
        "<tool_calls><tool_call>f<tool_sep><arg_key>",
        "hy_v3",
        "hy_v3",
        ("<tool_calls>", "</tool_calls>", *THINK),
        OPEN,
        model_type="hy_v3",
    ),
    "Hy4": Shown(
        "<tool_calls><tool_call>f<arg_key>",
        "hy_v4",
        "hy_v4",
        ("<tool_calls>", "</tool_calls>", "<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>", *THINK),
        OPEN,
        model_type="hy_v4",
    ),
    "Hunyuan-A13B": Shown(
        "<tool_calls>[]</tool_calls>",
        "hunyuan_a13b",
        "hunyuan_a13b",
        answer=SWITCH,
        architecture="HunYuanMoEV1ForCausalLM",
        pieces=(("<th", 14023), ("ink", 771), (">\u010a", 397)),
    ),
    "Hunyuan of another vocabulary": Shown(
        "<tool_calls>[]</tool_calls>", "hunyuan_a13b", None, answer=SWITCH, architecture="HunYuanMoEV1ForCausalLM"
    ),
    "Jamba": Shown("<tool_calls>[]</tool_calls>", "jamba", None, ("<tool_calls>", "</tool_calls>"), model_type="jamba"),
    "Ernie 4.5": Shown(JSON_CALL, "ernie45", None, THINK, model_type="ernie4_5_moe"),
    "Ernie 4.5 Thinking": Shown(JSON_CALL, "ernie45", "ernie45", THINK, OPEN, model_type="ernie4_5_moe"),
    "Seed-OSS": Shown(
        "<seed:tool_call><function=f><parameter=p>",
        "seed_oss",
        "seed_oss",
        ("<seed:think>", "</seed:think>"),
        history="<seed:think></seed:think>",
        model_type="seed_oss",
    ),
    "MiniMax-M2": Shown('<minimax:tool_call><invoke name="f">', "minimax_m2", "minimax_m2", THINK, OPEN),
    "MiniMax-M3": Shown(
        "]<]minimax[>[<tool_call>", "minimax_m3", "minimax_m3", ("<mm:think>", "</mm:think>"), "<mm:think>"
    ),
    "MiMo-7B": Shown(JSON_CALL, "hermes", None, THINK, model_type="mimo"),
    "MiMo-V2": Shown(XML_CALL, "mimo", "mimo", THINK, SWITCH, model_type="mimo_v2_flash"),
    "Step3": Shown("<steptml:invoke>", "step3", "step3", THINK, OPEN, model_type="step3_vl"),
    "Step-3.5": Shown(XML_CALL, "step3p5", "step3p5", THINK, OPEN, model_type="step3p5"),
    "MiniCPM5": Shown('<function name="f"><param name="p">', "minicpm5", "qwen3", THINK, SWITCH, model_type="minicpm"),
    "MiniCPM-V 4.6": Shown(XML_CALL, "qwen3_coder", "minicpmv", THINK, SWITCH, model_type="minicpmv4_6"),
    "LFM2": Shown("<|tool_list_start|>", "lfm2", None, ("<|tool_call_start|>", "<|tool_call_end|>"), ASSISTANT, CUT),
    "LFM2.5": Shown("<|tool_call_start|>[]", "lfm2", None, ("<|tool_call_start|>", "<|tool_call_end|>")),
    "Apertus": Shown("<|tools_prefix|>[]", "apertus", None, model_type="apertus"),
    "Olmo 3": Shown("<functions><function_calls>", "olmo3", None, model_type="olmo3"),
    "Olmo 3 Think": Shown(
        "<functions><function_calls>",
        "olmo3",
        "olmo3",
        answer=OPEN,
        model_type="olmo3",
        pieces=(("\u0120</", 900), ("</", 901), ("think", 902)),
    ),
    "InternLM": Shown("<|action_start|><|plugin|>", "internlm", None, model_type="internlm2"),
    "Phi-4-mini": Shown("functools[]", "phi4_mini_json", None, model_type="phi3"),
    "Phi-4-mini, its own template": Shown("<|tool|>", None, None, ("<|tool_call|>",), model_type="phi3"),
    "Phi-4-reasoning": Shown(
        "", None, "deepseek_r1", THINK, history="<think> {Thought section} </think>", model_type="phi3"
    ),
    "GigaChat 3": Shown("function call<|role_sep|>", "gigachat3", None),
    "GigaChat 3.1": Shown("<|role_sep|><|function_call|>", "gigachat3", None),
    "LongCat": Shown("<longcat_tool_call>", "longcat", None),
    "dots": Shown("<dots_function_call>", "dots", None),
    "K2 Horizon": Shown("<ifm|tool_calls>", "k2_horizon", "k2_horizon", ("<ifm|think>", "</ifm|think>"), "<ifm|think>"),
    "Muse Glimmer": Shown("<atem:function_calls>", "muse_glimmer", "muse_glimmer", history="to=self<|message|>"),
    "PLaMo 3": Shown(
        "<|plamo:begin_tool_requests:plamo|>",
        "plamo3",
        "plamo3",
        ("<|plamo:begin_tool_requests:plamo|>", "<|plamo:begin_think:plamo|>", "<|plamo:end_think:plamo|>"),
        "<|plamo:begin_think:plamo|>",
    ),
    "Command A": Shown(
        "<|START_ACTION|>", "cohere_command3", "cohere_command3", COHERE_TOKENS, history="<|START_THINKING|>"
    ),
    "Command A+": Shown(
        "<|START_ACTION|><|START_TEXT|>",
        "cohere_command4",
        "cohere_command4",
        COHERE_TOKENS,
        history="<|START_THINKING|>",
    ),
}

# Registered parsers that no row names.
UNCHOSEN_TOOLS = {
    "glm47": "the same class as glm45",
    "qwen3_json": "the same class as hermes",
    "qwen3_xml": "the same class as qwen3_coder",
    "hf": "chosen by the response template, without a row",
}
UNCHOSEN_REASONING = {
    "glm47": "the same class as glm45",
    "hf": "chosen by the response template, without a row",
    "granite": "Granite 3.2 thinks on request alone, and without thoughts this parser swallows streamed tool calls",
    "minimax_m2_append_think": "leaves the thought in the content, which is a caller's wish and no need of a model",
}


def format_of(shown: Shown) -> Format:
    """How its calls are written."""
    return next(form for form in FORMATS if shown.tool in form.tool)


def prompt_of(shown: Shown) -> str:
    """The prompt where the request says nothing of thinking."""
    if shown.mode != "auto":  # vLLM writes it
        return format_of(shown).usual_prompt
    messages = [{"role": "user", "content": "Hi"}]
    return str(shown.tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


OPENED = ("<think>", "<ifm|think>", "<mm:think>", "<|channel>thought", "<|plamo:begin_think:plamo|>", "think<|sep|>")
WITHOUT_AN_OPEN_THOUGHT = [
    name
    for name, shown in FAMILIES.items()
    if shown.tool and shown.reasoning and not prompt_of(shown).rstrip().endswith(OPENED)
]
# Where vLLM waits for the end of a thought that never began.
CALLS_LOST = {
    "DeepSeek-R1-0528": "all is reasoning up to </think>",
    "DSML, V3.2's": "all is reasoning up to </think> or <tool_call>",
    "MiniCPM5": "all is reasoning up to </think> or <tool_call>",
    "Hunyuan-A13B": "the tool parser sees nothing before </think>",
}

RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": ASSISTANT,
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "content": {},
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "json", "repeats": True},
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    shown = FAMILIES[name]
    choice = choose(shown)
    assert (choice.tool_parser, choice.reasoning_parser) == (shown.tool, shown.reasoning), choice.why
    assert f"tool parser {shown.tool or 'none'} " in choice.why
    assert f"reasoning parser {shown.reasoning or 'none'} " in choice.why
    assert "\n" not in choice.why


def test_every_registered_parser_is_in_the_table_or_left_out_for_a_reason() -> None:
    tools = {family.parser for family in families()["tool"]}
    reasoning = {family.parser for family in families()["reasoning"]}
    assert tools | UNCHOSEN_TOOLS.keys() == set(tool_parser_names())
    assert reasoning | UNCHOSEN_REASONING.keys() == set(reasoning_parser_names())
    assert not tools & UNCHOSEN_TOOLS.keys()
    assert not reasoning & UNCHOSEN_REASONING.keys()


def test_every_parser_of_the_table_has_a_family_here() -> None:
    tried = FAMILIES.values()
    assert {family.parser for family in families()["tool"]} == {shown.tool for shown in tried} - {None}
    assert {family.parser for family in families()["reasoning"]} == {shown.reasoning for shown in tried} - {None}


@pytest.mark.parametrize(
    ("alias", "name"), [("glm47", "glm45"), ("qwen3_json", "hermes"), ("qwen3_xml", "qwen3_coder")]
)
def test_aliases_are_the_same_class(alias: str, name: str) -> None:
    classes = [ParserManager.get_tool_parser(parser, enable_auto_tools=True) for parser in (alias, name)]
    assert classes[0] is classes[1]


@pytest.mark.parametrize("text", ["", "Hello. "])
@pytest.mark.parametrize(
    "name", [name for name, shown in FAMILIES.items() if shown.tool == "hermes" and shown.reasoning is None]
)
def test_a_streamed_call_is_found_where_no_reasoning_parser_is_chosen(name: str, text: str) -> None:
    shown = FAMILIES[name]
    chosen, held = choose(shown), shown.tokenizer()
    parser_class = ParserManager.get_parser(
        chosen.tool_parser, chosen.reasoning_parser, enable_auto_tools=True, tokenizer=held
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], tools=tools, stream=True)
    parser = parser_class(held, request.tools)
    prompt, ids = held.encode("Hi"), held.encode(text + '<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    called, content = [], ""
    for index, token in enumerate(ids):
        delta = parser.parse_delta(
            held.decode([token]), [token], request, prompt_token_ids=prompt, finished=index == len(ids) - 1
        )
        if delta is not None:
            content += delta.content or ""
            called += [call.function.name for call in delta.tool_calls if call.function.name]
    assert called == ["f"]
    assert content.strip() == text.strip()


@pytest.mark.parametrize("name", WITHOUT_AN_OPEN_THOUGHT)
async def test_a_streamed_call_without_a_thought_is_found_beside_the_chosen_reasoning_parser(name: str) -> None:
    shown = FAMILIES[name]
    form = format_of(shown)
    assert form.calls is not None
    # The tool parser's own tokens and, where it is another family's, those of the reasoning parser.
    added = tuple(dict.fromkeys((*form.added, *(token for token in shown.tokens if token not in form.special))))
    bench = Bench(dataclasses.replace(form, added=added, default_prompt=prompt_of(shown)), shown.tool, shown.reasoning)
    case = Case(raw=form.calls([WEATHER]), calls=(WEATHER,), thinks=None)
    streamed = await bench.ours_streamed((1,) * bench.take_up(case))
    fault = faults(case, streamed)
    assert ("the call is lost" in fault) if name in CALLS_LOST else not fault


def test_mistral_tokenizer(tmp_path: Path) -> None:
    data = Path(str(mistral_common.__file__)).parent / "data" / "tekken_240911.json"
    shutil.copy(data, tmp_path / "tekken.json")
    held = MistralTokenizer.from_pretrained(str(tmp_path))
    choice = choose_parsers(config("mistral"), held, tool_parser=None, reasoning_parser=None)
    assert (choice.tool_parser, choice.reasoning_parser) == ("mistral", None)  # this vocabulary has no [THINK]


def test_a_template_for_tools_alone_counts() -> None:
    held = tokenizer(None)
    held.chat_template = {"default": OUTLINE % ("", "", ASSISTANT), "tool_use": OUTLINE % (JSON_CALL, "", ASSISTANT)}
    assert choose_parsers(config(), held, tool_parser=None, reasoning_parser=None).tool_parser == "hermes"


@pytest.mark.parametrize("template", [None, "", "{% if %}<think>", "<think>{{ raise_exception('no') }}"])
def test_what_a_template_raises_is_no_evidence(template: str | None) -> None:
    held = tokenizer(template, THINK)
    choice = choose_parsers(config("qwen3"), held, tool_parser=None, reasoning_parser=None)
    assert (choice.tool_parser, choice.reasoning_parser) == (None, None)


def test_a_candidate_that_can_not_be_built_is_passed_over_and_named() -> None:
    choice = choose(Shown(LLAMA_CALL + "<|start_header_id|>", None, None))
    assert choice.tool_parser is None
    assert "not llama3_json: " in choice.why
    assert "<|python_tag|>" in choice.why


def test_response_template() -> None:
    held = tokenizer(OUTLINE % (JSON_CALL, "", SWITCH), THINK)
    held.response_template = RESPONSE_TEMPLATE

    def chosen(tool: str | None = None, reasoning: str | None = None) -> tuple[str | None, str | None]:
        choice = choose_parsers(config(), held, tool_parser=tool, reasoning_parser=reasoning)
        return choice.tool_parser, choice.reasoning_parser

    assert chosen() == ("hf", "hf")
    assert chosen("hf") == ("hf", "hf")
    assert chosen("none") == (None, "hf")
    # `hf` can't be mixed.
    assert chosen("hermes") == ("hermes", "qwen3")
    assert chosen(None, "qwen3") == ("hermes", "qwen3")
    with pytest.raises(InvalidRequest, match="'hermes' and reasoning_parser 'hf' don't go together"):
        chosen("hermes", "hf")


def test_response_template_without_thoughts() -> None:
    held = tokenizer(OUTLINE % (JSON_CALL, "", SWITCH), THINK)
    fields = {name: field for name, field in RESPONSE_TEMPLATE["fields"].items() if name != "thinking"}
    held.response_template = RESPONSE_TEMPLATE | {"fields": fields}
    choice = choose_parsers(config(), held, tool_parser=None, reasoning_parser=None)
    assert (choice.tool_parser, choice.reasoning_parser) == ("hf", None)


@pytest.mark.parametrize("empty", [None, "", " "])
def test_what_is_asked_for_is_taken(empty: str | None) -> None:
    shown = FAMILIES["Qwen3"]
    choice = choose(shown, "pythonic", empty)
    assert (choice.tool_parser, choice.reasoning_parser) == ("pythonic", "qwen3")
    assert "tool parser pythonic (as asked)" in choice.why
    choice = choose(shown, empty, "deepseek_r1")
    assert (choice.tool_parser, choice.reasoning_parser) == ("hermes", "deepseek_r1")


def test_none_is_a_choice_too() -> None:
    shown = FAMILIES["Qwen3"]
    assert dataclasses.astuple(choose(shown, "none", None))[:2] == (None, "qwen3")
    assert dataclasses.astuple(choose(shown, None, "none"))[:2] == ("hermes", None)
    assert dataclasses.astuple(choose(shown, "none", "none"))[:2] == (None, None)


@pytest.mark.parametrize(
    ("tool", "reasoning", "words"),
    [
        ("hermse", None, ("tool_parser 'hermse' doesn't exist", *tool_parser_names(), "none")),
        (None, "qwen33", ("reasoning_parser 'qwen33' doesn't exist", *reasoning_parser_names(), "none")),
        ("llama3_json", None, ("tool_parser 'llama3_json' doesn't fit", "<|python_tag|>", "hermes")),
        ("hf", None, ("tool_parser 'hf' doesn't fit", "response_template", "hermes")),
        (None, "deepseek_r1", ("reasoning_parser 'deepseek_r1' doesn't fit", "think", "qwen3")),
        # vLLM takes it, and the grammar would wait for the end of a thought for ever.
        (None, "qwen3", ("reasoning_parser 'qwen3' doesn't fit", "<think>", "not in the vocabulary", "deepseek_r1")),
    ],
)
def test_refused(tool: str | None, reasoning: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        choose(FAMILIES["SmolLM2"], tool, reasoning)
    for word in words:
        assert word in str(refused.value)


def test_harmony_takes_only_its_own() -> None:
    with pytest.raises(InvalidRequest, match="tool_parser 'hermes' doesn't fit"):
        choose(FAMILIES["gpt-oss"], "hermes", None)


def test_a_harmful_parser_is_warned_of() -> None:
    by_parser = {shown.tool: shown for shown in FAMILIES.values()}
    choice = choose(by_parser["jamba"])
    assert choice.tool_parser == "jamba"
    (harm,) = choice.beware
    assert "jamba" in harm
    assert choose(by_parser["hermes"]).beware == ()


@pytest.mark.parametrize("kind", ["tool", "reasoning"])
def test_only_parsers_with_known_defects_are_warned_of(kind: Literal["tool", "reasoning"]) -> None:
    names = tool_parser_names() if kind == "tool" else reasoning_parser_names()
    defects = {
        cell.parser
        for cell in CELLS
        if cell.kind == kind and ((str(cell), "splits") in known() or (str(cell), "whole") in known())
    }
    for name in names:
        assert not list(_harm(kind, name)) or name in defects


def test_parsers_that_lose_an_answer_without_markers_are_warned_of() -> None:
    lost = {
        cell.parser
        for cell in CELLS
        if (cell.kind, cell.case) == ("reasoning", "no markers")
        and any("the text is lost" in known().get((str(cell), mode), "") for mode in ("whole", "splits"))
    }
    assert lost & {family.parser for family in families()["reasoning"]}
    # Their models begin a thought as a rule, and a warning at every load of Qwen3 would be read by nobody.
    for name in lost - {"qwen3", "deepseek_r1"}:
        assert list(_harm("reasoning", name))
