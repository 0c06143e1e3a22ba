"""PredictOptions -> the request that vLLM takes: understood, or refused by name, whatever it holds."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from common.errors import BackendError, InvalidRequest
from common.pb import backend_pb2 as pb
from common.request import MOST_JSON, GenerationRequest, generation_request
from common.request_metadata import REASONING_EFFORTS
from common.vllm_errors import translated
from common.wire_names import WIRE_NAMES, from_vllm

HELLO = pb.Message(role="user", content="Hello")
CLOCK = '[{"type": "function", "function": {"name": "clock", "strict": false, "parameters": null}}]'


def understand(*, has_tool_parser: bool = True, stream: bool = False, **options: Any) -> GenerationRequest:
    return generation_request(pb.PredictOptions(**options), stream=stream, has_tool_parser=has_tool_parser)


def chat(*, has_tool_parser: bool = True, **options: Any) -> Any:
    fields: dict[str, Any] = {"UseTokenizerTemplate": True, "Messages": [HELLO]} | options
    request = understand(has_tool_parser=has_tool_parser, **fields)
    assert isinstance(request.openai, ChatCompletionRequest)
    return request.openai


@pytest.mark.parametrize(
    ("options", "is_chat"),
    [
        ({"UseTokenizerTemplate": True, "Messages": [HELLO]}, True),
        # Some endpoints fill Prompt as well: the messages win.
        ({"UseTokenizerTemplate": True, "Messages": [HELLO], "Prompt": "User: Hello"}, True),
        ({"UseTokenizerTemplate": True, "Prompt": "Hello"}, False),
        ({"Messages": [HELLO], "Prompt": "Hello"}, False),
        ({"Prompt": "Hello"}, False),
    ],
)
def test_messages_win_where_the_template_is_asked_for(options: dict[str, Any], is_chat: bool) -> None:
    request = understand(**options)
    assert request.is_chat is is_chat
    if is_chat:
        assert request.prompt_field == "Messages"
        assert request.openai.messages == [{"role": "user", "content": "Hello"}]
    else:
        assert request.prompt_field == "Prompt"
        assert request.openai.prompt == "Hello"


@pytest.mark.parametrize("options", [{}, {"Messages": [HELLO]}, {"UseTokenizerTemplate": True}])
def test_nothing_to_answer(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        understand(**options)
    assert caught.value.field == "Prompt"


@pytest.mark.parametrize(("tokens", "expected"), [(0, None), (-1, None), (-(2**31), None), (1, 1), (512, 512)])
def test_tokens(tokens: int, expected: int | None) -> None:
    assert understand(Prompt="x", Tokens=tokens).max_tokens == expected


def test_request_ids() -> None:
    assert understand(Prompt="x", CorrelationId="abc").request_id == "abc"
    first, second = understand(Prompt="x").request_id, understand(Prompt="x").request_id
    assert first != second
    assert len(first) == 32


@pytest.mark.parametrize("stream", [True, False])
def test_stream(stream: bool) -> None:
    assert understand(stream=stream, Prompt="x").openai.stream is stream


@pytest.mark.parametrize("options", [{"Prompt": "x"}, {"UseTokenizerTemplate": True, "Messages": [HELLO]}])
def test_sampling_reaches_vllm(options: dict[str, Any]) -> None:
    request = understand(
        **options,
        Temperature=0.7,
        TopP=0.9,
        TopK=40,
        MinP=0.05,
        Penalty=1.1,
        FrequencyPenalty=0.5,
        PresencePenalty=-0.5,
        Seed=7,
        StopPrompts=["a", "b"],
        IgnoreEOS=True,
        LogitBias='{"1": -100}',
        TopLogprobs=3,
    )
    params = request.openai.to_sampling_params(16, {"temperature": 1.5, "top_k": 5})
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.9, 40, 0.05)
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.1, 0.5, -0.5)
    assert (params.seed, params.stop, params.ignore_eos, params.logit_bias) == (7, ["a", "b"], True, {1: -100.0})
    assert (params.max_tokens, params.logprobs, params.n) == (16, 3, 1)


def test_temperature_zero_is_greedy_whatever_the_model_prefers() -> None:
    params = understand(Prompt="x").openai.to_sampling_params(16, {"temperature": 1.5})
    assert params.temperature == 0


def test_the_model_fills_what_is_unset() -> None:
    params = understand(Prompt="x", Temperature=1).openai.to_sampling_params(
        16, {"top_p": 0.5, "repetition_penalty": 1.2}
    )
    assert (params.top_p, params.repetition_penalty) == (0.5, 1.2)


@pytest.mark.parametrize("count", [1, 4, 5, 100, 1024])
def test_as_many_stop_strings_as_models_have(count: int) -> None:
    # vLLM's own limit is 4, the sum of a configuration's and a request's is often more.
    stop = [f"<{number}>" for number in range(count)]
    assert understand(Prompt="x", StopPrompts=stop).openai.to_sampling_params(16, {}).stop == stop
    assert chat(StopPrompts=stop).to_sampling_params(16, {}).stop == stop


@pytest.mark.parametrize(("logprobs", "top", "expected"), [(0, 0, None), (1, 0, 0), (0, 2, 2), (5, 5, 5)], ids=str)
def test_logprobs(logprobs: int, top: int, expected: int | None) -> None:
    request = understand(Prompt="x", Logprobs=logprobs, TopLogprobs=top)
    assert request.top_logprobs == expected
    assert request.openai.to_sampling_params(16, {}).logprobs == expected
    assert chat(Logprobs=logprobs, TopLogprobs=top).to_sampling_params(16, {}).logprobs == expected


def test_a_raw_prompt_has_its_special_tokens_added() -> None:
    assert understand(Prompt="x").openai.add_special_tokens is True
    assert chat().add_special_tokens is False


def test_a_grammar_reaches_vllm() -> None:
    grammar = 'root ::= "a"'
    for request in (understand(Prompt="x", Grammar=grammar).openai, chat(Grammar=grammar)):
        assert request.to_sampling_params(16, {}).structured_outputs.grammar == grammar
    metadata = {"json_schema": '{"type": "object"}'}
    assert chat(Metadata=metadata).to_sampling_params(16, {}).structured_outputs.json == {"type": "object"}
    metadata = {"response_format": '{"type": "json_object"}'}
    assert chat(Metadata=metadata).to_sampling_params(16, {}).structured_outputs.json_object is True


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("", "auto"), ('"auto"', "auto"), ("required", "required"), ('{"type": "any"}', "required")],
)
def test_tools(choice: str, expected: str) -> None:
    request = chat(Tools=CLOCK, ToolChoice=choice)
    assert [tool.function.name for tool in request.tools] == ["clock"]
    assert request.tool_choice == expected


def test_a_named_tool() -> None:
    request = chat(Tools=CLOCK, ToolChoice='{"type": "tool", "name": "clock"}')
    assert request.tool_choice.function.name == "clock"


@pytest.mark.parametrize("choice", ["none", '"none"', '{"type": "none"}'])
def test_no_tool_is_shown_where_none_may_be_called(choice: str) -> None:
    request = chat(Tools=CLOCK, ToolChoice=choice)
    assert not request.tools
    assert request.tool_choice == "none"


@pytest.mark.parametrize("tools", ["", "[]", "null"])
@pytest.mark.parametrize("choice", ["", "auto", "none", '"auto"', "null"])
def test_no_tools(tools: str, choice: str) -> None:
    request = chat(Tools=tools, ToolChoice=choice)
    assert not request.tools


@pytest.mark.parametrize("choice", ["required", '"required"', '{"type": "any"}', '{"name": "clock"}'])
def test_a_call_is_demanded_without_tools(choice: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(ToolChoice=choice)
    assert caught.value.field == "ToolChoice"


def test_without_a_tool_parser_tools_are_shown_but_not_parsed() -> None:
    request = chat(has_tool_parser=False, Tools=CLOCK)
    assert [tool.function.name for tool in request.tools] == ["clock"]
    assert request.tool_choice == "none"
    assert not chat(has_tool_parser=False, Tools=CLOCK, ToolChoice="none").tools


@pytest.mark.parametrize("choice", ["required", '{"name": "clock"}'])
def test_without_a_tool_parser_no_call_can_be_demanded(choice: str) -> None:
    with pytest.raises(InvalidRequest, match="tool_parser") as caught:
        chat(has_tool_parser=False, Tools=CLOCK, ToolChoice=choice)
    assert caught.value.field == "ToolChoice"


def test_a_raw_prompt_has_no_tools() -> None:
    request = understand(Prompt="x", Tools="[broken", ToolChoice="broken", Metadata={"enable_thinking": "perhaps"})
    assert isinstance(request.openai, CompletionRequest)


@pytest.mark.parametrize(
    ("metadata", "kwargs", "effort"),
    [
        ({}, None, None),
        ({"unknown": "x"}, None, None),
        ({"enable_thinking": "true"}, {"enable_thinking": True, "thinking": True}, None),
        ({"enable_thinking": "false"}, {"enable_thinking": False, "thinking": False}, None),
        ({"enable_thinking": ""}, None, None),
        ({"chat_template_kwargs": ""}, None, None),
        ({"chat_template_kwargs": "{}"}, None, None),
        ({"chat_template_kwargs": '{"a": [1], "b": null}'}, {"a": [1], "b": None}, None),
        (
            {"chat_template_kwargs": '{"enable_thinking": true}', "enable_thinking": "false"},
            {"enable_thinking": False, "thinking": False},
            None,
        ),
        (
            {
                "chat_template_kwargs": '{"chat_template": "x", "tokenize": 1, "messages": [], "tools": [], "a": 1,'
                ' "conversation": [], "self": 1, "continue_final_message": true}'
            },
            {"a": 1},
            None,
        ),
        ({"reasoning_effort": "low"}, {"thinking": True}, "low"),
        ({"reasoning_effort": "none"}, {"thinking": False}, "none"),
        ({"reasoning_effort": "low", "enable_thinking": "false"}, {"enable_thinking": False, "thinking": False}, "low"),
        (
            {"enable_thinking": "true", "chat_template_kwargs": '{"thinking": false}'},
            {"enable_thinking": True, "thinking": False},
            None,
        ),
        ({"reasoning_effort": ""}, None, None),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": '{"reasoning_effort": "low", "a": 1}'},
            {"a": 1, "thinking": True},
            "high",
        ),
    ],
)
def test_metadata(metadata: dict[str, str], kwargs: dict[str, Any] | None, effort: str | None) -> None:
    request = chat(Metadata=metadata)
    assert request.chat_template_kwargs == kwargs
    assert request.reasoning_effort == effort


def test_documents_reach_the_template() -> None:
    documents = [{"title": "a", "text": "b"}]
    request = chat(Metadata={"chat_template_kwargs": json.dumps({"documents": documents})})
    assert request.build_chat_params(None, "auto").chat_template_kwargs["documents"] == documents


def test_continue_final_message() -> None:
    history = [pb.Message(role="user", content="Hi"), pb.Message(role="assistant", content="Well,")]
    kwargs = '{"continue_final_message": true, "a": 1}'  # the orchestrator copies all metadata there
    request = chat(Messages=history, Metadata={"continue_final_message": "true", "chat_template_kwargs": kwargs})
    assert (request.continue_final_message, request.add_generation_prompt) == (True, False)
    assert request.chat_template_kwargs == {"a": 1}
    for metadata in ({}, {"continue_final_message": "false"}):
        request = chat(Messages=history, Metadata=metadata)
        assert (request.continue_final_message, request.add_generation_prompt) == (False, True)
    with pytest.raises(InvalidRequest, match="assistant's message"):
        chat(Messages=history[:1], Metadata={"continue_final_message": "true"})


def test_cache_salt_and_adapter() -> None:
    asked: list[dict[str, Any]] = [{"Prompt": "x"}, {"UseTokenizerTemplate": True, "Messages": [HELLO]}]
    for fields in asked:
        request = understand(**fields, Metadata={"cache_salt": "a", "lora": "b"})
        assert request.openai.cache_salt == "a"
        assert request.adapter == "b"
        request = understand(**fields, Metadata={"cache_salt": "", "lora": ""})
        assert request.openai.cache_salt is None
        assert request.adapter == ""


@pytest.mark.parametrize(("asked", "rank"), [("", None), ("0", 0), ("2", 2), ("002", 2)])
def test_a_rank(asked: str, rank: int | None) -> None:
    options = pb.PredictOptions(Prompt="x", Metadata={"data_parallel_rank": asked})
    assert generation_request(options, stream=False, has_tool_parser=False, ranks=3).rank == rank


@pytest.mark.parametrize("asked", ["3", "-1", "+1", "1.0", "1e0", " 1", "one", "٣", "²", "9" * 5000])
def test_a_rank_that_there_is_not(asked: str) -> None:
    options = pb.PredictOptions(Prompt="x", Metadata={"data_parallel_rank": asked})
    with pytest.raises(InvalidRequest, match="use 0 to 2, or leave it out") as caught:
        generation_request(options, stream=False, has_tool_parser=False, ranks=3)
    assert caught.value.field == 'Metadata["data_parallel_rank"]'


def test_a_seed_that_is_ignored() -> None:
    options = pb.PredictOptions(Prompt="x", Seed=7)
    seeds = [
        generation_request(options, stream=False, has_tool_parser=False, ignore_seed=ignore).openai.seed
        for ignore in (False, True)
    ]
    assert seeds == [7, None]


def test_request_id() -> None:
    assert understand(Prompt="x", CorrelationId="abc 1").request_id == "abc 1"
    assert understand(Prompt="x").request_id != understand(Prompt="x").request_id
    for odd in ("two\nlines", "\x1b[31m", "x" * 257):
        with pytest.raises(InvalidRequest, match="CorrelationId"):
            understand(Prompt="x", CorrelationId=odd)


@pytest.mark.parametrize(
    "fields",
    [
        {"Messages": [pb.Message(role="x" * 100_000)]},
        *({"Metadata": {key: "x" * 100_000}} for key in ("enable_thinking", "reasoning_effort", "data_parallel_rank")),
    ],
    ids=["role", "switch", "effort", "rank"],
)
def test_a_long_word_is_not_repeated(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("effort", REASONING_EFFORTS)
def test_every_effort_is_one_of_vllm(effort: str) -> None:
    assert chat(Metadata={"reasoning_effort": effort}).reasoning_effort == effort


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enable_thinking", "True"),
        ("enable_thinking", "1"),
        ("enable_thinking", "null"),
        ("reasoning_effort", "extreme"),
        ("reasoning_effort", "Low"),
        ("chat_template_kwargs", "[]"),
        ("chat_template_kwargs", "5"),
        ("chat_template_kwargs", "null"),
        ("chat_template_kwargs", "{"),
        ("chat_template_kwargs", '{"a": NaN}'),
        pytest.param("chat_template_kwargs", '{"a":' * 100_000, id="deep"),
        ("continue_final_message", "yes"),
        ("cache_salt", "a/b"),
        ("cache_salt", "x" * 129),
        ("json_schema", "[]"),
        ("response_format", "{}"),
    ],
)
def test_metadata_that_cannot_be_used(key: str, value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(Metadata={key: value})
    assert caught.value.field == f'Metadata["{key}"]'


@pytest.mark.parametrize(
    ("error", "prompt_field", "field", "text"),
    [
        (VLLMValidationError("too hot", parameter="temperature", value=9), "Messages", "Temperature", "too hot"),
        (VLLMValidationError("too long", parameter="input_tokens", value="x"), "Messages", "Messages", "too long"),
        (VLLMValidationError("too long", parameter="input_text", value="x"), "Prompt", "Prompt", "too long"),
        (VLLMValidationError("odd", parameter="mystery"), "Messages", "mystery", "odd"),
        (VLLMValidationError("odd"), "Messages", "Messages", "odd"),
        (ValueError("odd"), "Prompt", "Prompt", "odd"),
        (ValueError(), "Prompt", "Prompt", ""),
    ],
)
def test_refusals_of_vllm(error: Exception, prompt_field: str, field: str, text: str) -> None:
    refusal = from_vllm(error, prompt_field)
    assert refusal.field == field
    assert str(refusal) == f"{field}: {text}"


def test_a_refusal_does_not_repeat_the_prompt() -> None:
    assert "secret" not in str(from_vllm(VLLMValidationError("long", parameter="prompt", value="secret")))


def test_a_text_that_has_no_bytes_is_named() -> None:
    with pytest.raises(UnicodeEncodeError) as caught:
        "a\ud800".encode()
    assert "surrogates" in str(from_vllm(caught.value))


def test_names_of_the_wire() -> None:
    fields = pb.PredictOptions.DESCRIPTOR.fields_by_name
    assert all(name.partition("[")[0] in fields for name in WIRE_NAMES.values())


# Anything at all that protobuf carries.
TEXT = st.text(max_size=20) | st.sampled_from(["\0", "\ufffd", "\N{GRINNING FACE}", "\u2028", "true", "null", "auto"])
NUMBER = st.sampled_from([0, 1, -1, -2, 5, 20, 21, 2**31 - 1, -(2**31)])
FLOAT = st.sampled_from([0.0, -0.0, 1e-45, 0.5, 1.0, 2.0, 3e38, -1.0, math.nan, math.inf, -math.inf]) | st.floats(
    width=32
)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from([10**400, "clock", "function", "auto", "\ud800", "object", "string", "integer"])
)
KEYS = st.sampled_from(
    [
        "type",
        "function",
        "name",
        "arguments",
        "parameters",
        "id",
        "schema",
        "json_schema",
        "properties",
        "items",
        "1",
        "15",
        "description",
        "strict",
        "pattern",
        "$ref",
        "enum",
        "anyOf",
        "minimum",
        "required",
    ]
)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4),
    max_leaves=8,
)
JSON = st.one_of(
    VALUE.map(json.dumps),
    VALUE.map(lambda value: json.dumps(json.dumps(value))),
    VALUE.map(lambda value: json.dumps(value)[:-1]),
    TEXT,
    st.sampled_from(
        ["", " ", "[" * 3000, '{"a":' * 990 + "1" + "}" * 990, "9" * 5000, '{"1": 1e999}', CLOCK, "\ufeff{}"]
    ),
)
GRAMMAR = st.one_of(
    JSON,
    st.text(alphabet='rot:= "|.()[]{}<>#\\\n?*+0,2-a', max_size=30).map(lambda text: "root ::= " + text),
    st.sampled_from(['root ::= "a"', "root ::= root", 'root ::= "a"{9999999}', "root ::= ''", 'root ::= ("")*']),
)
MESSAGE = st.builds(
    pb.Message,
    role=st.sampled_from(["user", "assistant", "system", "tool", "function", "developer", "", "x"]),
    content=TEXT,
    name=TEXT,
    tool_call_id=TEXT,
    reasoning_content=TEXT,
    tool_calls=JSON | st.lists(VALUE).map(json.dumps),
)
OPTIONS = st.builds(
    pb.PredictOptions,
    Prompt=TEXT,
    UseTokenizerTemplate=st.sampled_from([True, True, False]),
    Messages=st.lists(MESSAGE, max_size=3) | st.just([HELLO]),
    Tools=JSON | st.just(CLOCK),
    ToolChoice=JSON | TEXT,
    Grammar=st.just("") | GRAMMAR,
    Metadata=st.dictionaries(
        st.sampled_from(
            [
                "enable_thinking",
                "reasoning_effort",
                "chat_template_kwargs",
                "json_schema",
                "continue_final_message",
                "cache_salt",
                "data_parallel_rank",
                "lora",
            ]
        )
        | st.sampled_from(["response_format", "other"]),
        JSON | st.sampled_from(["true", "false", "low"]),
        max_size=3,
    ),
    LogitBias=st.just("") | JSON,
    StopPrompts=st.lists(TEXT, max_size=6),
    Images=st.lists(TEXT, max_size=1),
    Videos=st.lists(TEXT, max_size=1),
    Audios=st.lists(TEXT, max_size=1),
    CorrelationId=TEXT,
    ModelIdentity=TEXT,
)
NUMBERS = st.fixed_dictionaries(
    dict.fromkeys(("Tokens", "TopK", "Seed", "Logprobs", "TopLogprobs", "Threads"), NUMBER)
    | dict.fromkeys(("Temperature", "TopP", "MinP", "Penalty", "FrequencyPenalty", "PresencePenalty"), FLOAT)
)


def answer(options: pb.PredictOptions, *, has_tool_parser: bool) -> None:
    """Understand `options` as far as can be done without an engine; only our own exceptions may come of it."""
    try:
        request = generation_request(options, stream=True, has_tool_parser=has_tool_parser)
        with translated(request.prompt_field):
            params = request.openai.to_sampling_params(16, {})
    except BackendError as error:
        assert str(error)  # noqa: PT017  # nothing is expected in particular
    else:
        # What comes through here vLLM takes: its own refusal would name no field.
        validate_xgrammar_grammar(params)


@given(OPTIONS, st.booleans())
def test_any_request_is_understood_or_refused(options: pb.PredictOptions, has_tool_parser: bool) -> None:
    answer(options, has_tool_parser=has_tool_parser)


@given(NUMBERS)
def test_any_numbers_are_understood_or_refused(numbers: dict[str, Any]) -> None:
    answer(pb.PredictOptions(Prompt="x", **numbers), has_tool_parser=True)


@pytest.mark.parametrize("field", ["Tools", "ToolChoice", "Grammar", "LogitBias"])
@given(text=JSON)
def test_any_json_in_a_sound_request_is_understood_or_refused(field: str, text: str) -> None:
    fields: dict[str, Any] = {"Tools": CLOCK} | {field: text}
    answer(pb.PredictOptions(UseTokenizerTemplate=True, Messages=[HELLO], **fields), has_tool_parser=True)


@given(TEXT, TEXT)
def test_any_text_arrives_as_it_is(content: str, stop: str) -> None:
    request = chat(Messages=[pb.Message(role="user", content=content)], StopPrompts=[stop or "x"])
    assert request.messages[0]["content"] == content
    assert request.stop == [stop or "x"]


@pytest.mark.parametrize("field", ["Grammar", "Tools", "json_schema", "response_format"])
def test_what_would_be_compiled_for_seconds_is_refused(field: str) -> None:
    text = " " * (MOST_JSON + 1)
    fields: dict[str, Any] = {field: text} if field[0].isupper() else {"Metadata": {field: text}}
    with pytest.raises(InvalidRequest, match=f"use at most {MOST_JSON}"):
        chat(**fields)


def test_one_call_at_a_time() -> None:
    choice = '{"type": "auto", "disable_parallel_tool_use": true}'
    request = understand(UseTokenizerTemplate=True, Messages=[HELLO], Tools=CLOCK, ToolChoice=choice)
    assert request.one_call
    assert request.openai.parallel_tool_calls is False
    assert not understand(UseTokenizerTemplate=True, Messages=[HELLO], Tools=CLOCK).one_call
