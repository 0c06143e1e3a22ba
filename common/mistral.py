"""What Mistral's own tokenizers take of a chat: they render it themselves, without a template."""

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.utils.mistral import mt


def prepare(chat: ChatCompletionRequest) -> None:
    """Make it what generation's renderer makes of it, for a renderer that does not."""
    leave_template_out(chat)
    mt.maybe_serialize_tool_calls(chat)
    mt.truncate_tool_call_ids(chat)
    mt.validate_request_params(chat)


def leave_template_out(chat: ChatCompletionRequest) -> None:
    """Drop the variables of a template, which vLLM refuses, but for an effort that these tokenizers know."""
    variables, chat.chat_template_kwargs = chat.chat_template_kwargs or {}, None
    effort = variables.get("reasoning_effort")
    if chat.reasoning_effort is None and effort in list(mt.ReasoningEffort):
        chat.reasoning_effort = effort
