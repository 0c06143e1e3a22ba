"""What vLLM refuses in a request, under the wire's names of the fields."""

import pydantic
from vllm.exceptions import VLLMClientError

from common.errors import InvalidRequest

# OpenAI's names, as they stand in vLLM's messages -> the wire's.
WIRE_NAMES = {
    "allowed_token_ids": "LogitBias",
    "audio": "Audios",
    "cache_salt": 'Metadata["cache_salt"]',
    "frequency_penalty": "FrequencyPenalty",
    "image": "Images",
    "input_text": "Prompt",
    "input_tokens": "Prompt",
    "logit_bias": "LogitBias",
    "logprobs": "Logprobs",
    "max_completion_tokens": "Tokens",
    "max_tokens": "Tokens",
    "messages": "Messages",
    "min_p": "MinP",
    "presence_penalty": "PresencePenalty",
    "prompt": "Prompt",
    "reasoning_effort": 'Metadata["reasoning_effort"]',
    "repetition_penalty": "Penalty",
    "response_format": 'Metadata["response_format"]',
    "seed": "Seed",
    "stop": "StopPrompts",
    "structured_outputs": "Grammar",
    "temperature": "Temperature",
    "tool_choice": "ToolChoice",
    "tools": "Tools",
    "top_k": "TopK",
    "top_logprobs": "TopLogprobs",
    "top_p": "TopP",
    "video": "Videos",
}


def from_vllm(error: Exception, prompt_field: str = "Prompt") -> InvalidRequest:
    """vLLM's refusal of a request, under the wire's name of the field."""
    parameter = getattr(error, "parameter", None)
    field = WIRE_NAMES.get(str(parameter), str(parameter)) if parameter else prompt_field
    if field == "Prompt":
        field = prompt_field
    # str() would repeat the parameter's name and the whole value, which may be the prompt.
    text = str(error.args[0]) if isinstance(error, VLLMClientError) and error.args else str(error)
    if "structural tag" in text:
        return InvalidRequest("Tools", f"the parameters of a function can't be enforced: {text}")
    return InvalidRequest(field, text)


def from_pydantic(error: pydantic.ValidationError) -> InvalidRequest:
    """The first thing that a request model of vLLM refuses, under the wire's name of the field."""
    problem = error.errors(include_url=False, include_input=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    return InvalidRequest(WIRE_NAMES.get(name, name or "request"), problem["msg"])
