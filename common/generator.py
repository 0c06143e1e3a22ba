"""What all requests to one engine share on their way through it: the renderer, the parsers, the defaults."""

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.parser.abstract_parser import Parser
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.engine.async_llm import AsyncLLM

from common import harmony
from common.errors import InvalidRequest
from common.lora import Adapters
from common.media import Item, fields_of
from common.media_prompt import TEXT_ONLY, named, raw_prompt
from common.mistral import leave_template_out
from common.pacing import Pace
from common.parsers import ParserChoice
from common.rendering import Renderer
from common.request import GenerationRequest


class Generator:
    """The shared side of `generation.Run`."""

    def __init__(self, llm: AsyncLLM, parsers: ParserChoice, adapters: Adapters) -> None:
        self.llm = llm
        self.adapters = adapters
        self.pace = Pace()
        self.model_config = llm.model_config
        self.renderer = OnlineRenderer(
            self.model_config,
            Renderer(llm.renderer),
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=parsers.tool_parser is not None,
            tool_parser=parsers.tool_parser,
            reasoning_parser=parsers.reasoning_parser,
        )
        self.parser_class: type[Parser] | None = self.renderer.parser
        self.default_sampling: dict[str, Any] = self.model_config.get_diff_sampling_param()
        # The most tokens that whoever runs the model allows, as vLLM's server reads it.
        self.most_tokens: int | None = (
            self.default_sampling.get("max_tokens")
            if self.model_config.generation_config not in ("auto", "vllm")
            else self.model_config.override_generation_config.get("max_new_tokens")
        )

    @property
    def has_tool_parser(self) -> bool:
        """Whether tool calls are parsed out of answers."""
        return self.parser_class is not None and self.parser_class.tool_parser_cls is not None

    @property
    def max_logprobs(self) -> int:
        """Most alternatives per token that the engine reports."""
        limit = self.model_config.max_logprobs
        return int(limit if limit >= 0 else self.model_config.get_vocab_size())

    def parser(self, request: ChatCompletionRequest) -> Parser | None:
        """A fresh parser: they keep state, so each answer needs its own."""
        if self.parser_class is None:
            return None
        return self.parser_class(
            self.llm.get_tokenizer(),
            request.tools,
            chat_template_kwargs=self.renderer.effective_chat_template_kwargs(request),
            model_config=self.model_config,
        )

    @property
    def reads_ids(self) -> bool:
        """Whether the parser understands an answer by its token ids alone, whatever its text is: gpt-oss'."""
        return bool(self.renderer.use_harmony)

    async def engine_input(self, chat: ChatCompletionRequest, media: Sequence[Item]) -> Any:
        """The prompt of a chat, rendered and tokenised, however long it is; `media` are those in its messages.

        Raises:
            InvalidRequest: the model's template, or vLLM, refuses it.

        """
        if self.renderer.use_harmony:
            if media:  # which vLLM would leave out
                raise InvalidRequest(fields_of(media), TEXT_ONLY)
            rendered = await harmony.render_chat(self.renderer, chat)
        else:
            rendered = await self.renderer.render_chat(chat)
        return _only(rendered if isinstance(rendered, ErrorResponse) else rendered[1], "Messages")

    async def render(self, request: GenerationRequest) -> Any:
        """The engine input of a request: its prompt, rendered and tokenised.

        Raises:
            InvalidRequest: the template refuses the messages, or the prompt leaves no room for an answer.

        """
        with named(request.media):
            if request.is_chat:
                if is_mistral_tokenizer(self.llm.renderer.tokenizer):
                    leave_template_out(request.openai)
                engine_input = await self.engine_input(request.openai, request.media)
            else:
                openai = request.openai
                if request.media:
                    prompt = await raw_prompt(openai.prompt, request.media, self.llm.renderer)
                    # A copy: the request lives as long as its answer, decoded media only until they are prepared.
                    openai = openai.model_copy(update={"prompt": prompt})
                    del prompt
                engine_input = _only(await self.renderer.render_completion(openai), "Prompt")
        length = extract_prompt_len(self.model_config, engine_input)
        if length >= self.model_config.max_model_len:
            raise InvalidRequest(
                request.prompt_field,
                f"has {length} tokens; the context of {self.model_config.max_model_len} must leave one for the answer",
            )
        return engine_input


def _only(rendered: Any, field: str) -> Any:
    """The one input that vLLM has rendered, or its refusal of what is in `field`."""
    if isinstance(rendered, ErrorResponse):
        raise InvalidRequest(field, rendered.error.message)
    (engine_input,) = rendered
    return engine_input
