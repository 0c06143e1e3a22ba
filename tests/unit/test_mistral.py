"""Chats for Mistral's own tokenizers, which render them without a template, of the versions that models have.

No engine, but vLLM's renderer and parsers: what a request goes through up to there.
"""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.renderers.mistral import MistralRenderer
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from common.errors import InvalidRequest
from common.generator import Generator
from common.lora import NO_ADAPTERS, Adapters
from common.parsers import choose_parsers
from common.pb import backend_pb2 as pb
from common.request import GenerationRequest, generation_request
from common.tokens import prompt_of, tokenize
from common.vllm_errors import translated
from tests.parsers.tokenizer import mistral_tokenizer

# Before 11 grammars can't be made, from 13 on thoughts are tokens, and from 15 on the prompt has the effort.
VERSIONS = (3, 11, 13, 15)
USER = pb.Message(role="user", content="Hi")
# As this server and OpenAI's write them; Mistral's have nine characters.
CALL_ID = "chatcmpl-tool-0123456789abcdef"
CALL = {"id": CALL_ID, "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
HISTORY = (
    USER,
    pb.Message(role="assistant", tool_calls=json.dumps([CALL])),
    pb.Message(role="tool", tool_call_id=CALL_ID, name="get_weather", content="18 C"),
    pb.Message(role="assistant", content="Warm."),
    USER,
)
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        }
    ]
)


@pytest.fixture(scope="module", params=VERSIONS)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    tokenizer = mistral_tokenizer(request.param, tmp_path_factory.mktemp("tekken"))
    hf_config = SimpleNamespace(model_type="mistral", architectures=["MistralForCausalLM"])
    config = SimpleNamespace(
        model="any",
        hf_config=hf_config,
        hf_text_config=hf_config,
        renderer_num_workers=1,
        is_multimodal_model=False,
        supports_multimodal_inputs=False,
        multimodal_config=None,
        enable_prompt_embeds=False,
        is_encoder_decoder=False,
        max_model_len=4096,
        generation_config="vllm",
        override_generation_config={},
        get_diff_sampling_param=dict,
    )
    engine_config = SimpleNamespace(model_config=config, parallel_config=SimpleNamespace(_api_process_rank=0))
    renderer = MistralRenderer(cast("Any", engine_config), tokenizer)
    llm = SimpleNamespace(renderer=renderer, model_config=config, get_tokenizer=lambda: tokenizer)
    parsers = choose_parsers(cast("Any", config), tokenizer, tool_parser=None, reasoning_parser=None)
    yield Generator(cast("Any", llm), parsers, Adapters(NO_ADAPTERS))
    renderer.shutdown()


def version(generator: Generator) -> int:
    return int(generator.llm.get_tokenizer().version)


def options(*messages: pb.Message, **fields: Any) -> pb.PredictOptions:
    return pb.PredictOptions(UseTokenizerTemplate=True, Temperature=0.5, Messages=messages or [USER], **fields)


def understood(*messages: pb.Message, **fields: Any) -> GenerationRequest:
    return generation_request(options(*messages, **fields), stream=True, has_tool_parser=True)


async def rendered(generator: Generator, request: GenerationRequest) -> str:
    """The prompt, as a request goes."""
    return str(generator.llm.get_tokenizer().decode(await rendered_ids(generator, request)))


async def rendered_ids(generator: Generator, request: GenerationRequest) -> list[int]:
    with translated(request.prompt_field):
        engine_input = await generator.render(request)
    return list(engine_input["prompt_token_ids"])


@pytest.mark.parametrize("fields", [{}, {"Tools": TOOLS}, {"Tools": TOOLS, "ToolChoice": "required"}])
async def test_a_chat_has_the_grammar_of_its_version(generator: Generator, fields: dict[str, Any]) -> None:
    request = understood(**fields)
    prompt = await rendered(generator, request)
    assert "[INST]Hi[/INST]" in prompt
    assert ("get_weather" in prompt) == bool(fields)
    params = request.openai.to_sampling_params(16, {})
    validate_xgrammar_grammar(params)
    constraint = params.structured_outputs
    # Older versions have one for calls that are forced, and no other.
    assert (constraint is not None) == (version(generator) >= 11 or "ToolChoice" in fields)
    if version(generator) >= 11:
        assert constraint is not None
        assert ("<[9]>" in (constraint.grammar or "")) == bool(fields)  # the token [TOOL_CALLS]


@pytest.mark.parametrize(
    ("metadata", "effort"),
    [
        ({"enable_thinking": "false"}, None),
        ({"chat_template_kwargs": '{"user_id": "u", "custom": [1], "enable_thinking": true}'}, None),
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "high", "chat_template_kwargs": '{"reasoning_effort": "none"}'}, "high"),
        # A client's metadata can take the place of the orchestrator's.
        ({"chat_template_kwargs": '{"reasoning_effort": "high"}'}, "high"),
        ({"chat_template_kwargs": '{"reasoning_effort": "low"}'}, None),
        ({"chat_template_kwargs": '{"reasoning_effort": ["high"]}'}, None),
    ],
)
async def test_what_is_meant_for_a_template_is_left_out(
    generator: Generator, metadata: dict[str, str], effort: str | None
) -> None:
    prompt = await rendered(generator, understood(Metadata=metadata))
    settings = f'[MODEL_SETTINGS]{{"reasoning_effort": "{effort or "none"}"}}[/MODEL_SETTINGS]'
    assert prompt == f"<s>{settings if version(generator) >= 15 else ''}[INST]Hi[/INST]"


async def test_an_effort_that_no_tokenizer_knows_is_refused_by_its_name(generator: Generator) -> None:
    with pytest.raises(InvalidRequest, match=r'^Metadata\["reasoning_effort"\]: reasoning_effort=low is not supported'):
        await rendered(generator, understood(Metadata={"reasoning_effort": "low"}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"Tools": TOOLS},
        {"Metadata": {"enable_thinking": "false"}},
        {"Metadata": {"chat_template_kwargs": '{"reasoning_effort": "high"}'}},
        {"Metadata": {"chat_template_kwargs": '{"reasoning_effort": "low"}'}},
    ],
)
@pytest.mark.parametrize("messages", [(USER,), HISTORY])
async def test_tokenize_string_has_the_prompt_of_a_chat(
    generator: Generator, messages: tuple[pb.Message, ...], fields: dict[str, Any]
) -> None:
    wanted = await rendered_ids(generator, understood(*messages, **fields))
    prompt = prompt_of(options(*messages, **fields), has_tool_parser=True)
    assert await tokenize(generator.llm, prompt, generator) == wanted


async def test_tokenize_string_refuses_what_a_chat_does(generator: Generator) -> None:
    prompt = prompt_of(options(Metadata={"reasoning_effort": "low"}), has_tool_parser=True)
    with pytest.raises(InvalidRequest, match=r'^Metadata\["reasoning_effort"\]: reasoning_effort=low is not supported'):
        await tokenize(generator.llm, prompt, generator)
