"""Embedding: one vector for an input, or one per token."""

from typing import Any

from google.protobuf.wrappers_pb2 import BytesValue
from vllm import PoolingParams
from vllm.entrypoints.pooling.embed.io_processor import EmbedIOProcessor
from vllm.entrypoints.pooling.embed.protocol import EmbeddingChatRequest
from vllm.entrypoints.pooling.typing import PoolingEngineInput, PoolingServeContext
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput
from vllm.renderers.chat_utils import ChatTemplateConfig
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.utils.mistral import is_mistral_tokenizer

from common.concurrency import in_thread, task_group
from common.embedding_request import EmbeddingRequest, embedding_request, is_heavy, too_long
from common.engine import Engine
from common.lora import Adapters
from common.media_prompt import named, raw_prompt
from common.pb import backend_pb2 as pb
from common.pooling import pool
from common.rendering import Renderer
from common.vllm_errors import admit, admit_together, translated


class Embedder:
    """Embeds inputs with the loaded model."""

    def __init__(self, engine: Engine, adapters: Adapters) -> None:
        self._llm = engine.llm
        self._adapters = adapters
        self._renderer = Renderer(engine.llm.renderer)
        self._task: Any = engine.abilities.pooling
        self._chunks: EmbedIOProcessor | None = None

    def warm_up(self) -> None:
        """Read of the model's folder what the first request would otherwise be held up by. Blocks."""
        config = self._llm.model_config
        if config.is_matryoshka:
            _ = config.embedding_size
        if self._task == "embed" and config.pooler_config.enable_chunked_processing:
            self._chunks = EmbedIOProcessor(self._llm.vllm_config, self._llm.renderer, ChatTemplateConfig())

    async def embed(self, options: pb.PredictOptions) -> pb.EmbeddingResult:
        """The embedding of one input. Cancelling drops it.

        Raises:
            InvalidRequest: a field that can't be used, an input that is too long or in more pieces than are ever
                admitted, media that the model doesn't take.
            Overloaded, EngineGone: see there.

        """
        admit(self._llm)
        config = self._llm.model_config
        if is_heavy(options):
            request = await in_thread(embedding_request, options, config)
        else:
            request = embedding_request(options, config)
        adapter = self._adapters.pick(request.adapter)
        params = self._params(request)
        with translated(request.field):
            engine_input = await self._render(request)
            if self._chunks is not None and engine_input["type"] == "token":
                output = await self._pool_in_chunks(self._chunks, engine_input, params, request, adapter)
            else:
                output = await pool(self._llm, engine_input, params, request.request_id, lora_request=adapter)
        return embedding_result(output.outputs.data, len(output.prompt_token_ids))

    def _params(self, request: EmbeddingRequest) -> PoolingParams:
        params = request.openai.to_pooling_params()
        params.task = self._task
        # Of what can be wrong here, only this is left.
        with translated('Metadata["dimensions"]'):
            params.verify(self._llm.model_config)
        return params

    async def _render(self, request: EmbeddingRequest) -> Any:
        """The input as the engine takes it."""
        openai, renderer, config = request.openai, self._renderer, self._llm.model_config
        limits = openai.build_tok_params(config)
        extras = {"cache_salt": openai.cache_salt} if openai.cache_salt else None
        try:
            with named(request.media):
                if isinstance(openai, EmbeddingChatRequest):
                    multimodal = config.multimodal_config
                    chat = openai.build_chat_params(None, "auto").with_defaults(
                        {"tokenize": is_mistral_tokenizer(renderer.tokenizer)},
                        default_media_io_kwargs=multimodal.media_io_kwargs if multimodal else None,
                    )
                    _, (rendered,) = await renderer.render_chat_async(
                        [openai.messages], chat, limits, prompt_extras=extras
                    )
                    return rendered
                kind = "prompt" if isinstance(openai.input, str) else "prompt_token_ids"
                prompt: Any = {kind: openai.input}
                if request.media:
                    prompt = await raw_prompt(openai.input, request.media, renderer)
                (rendered,) = await renderer.render_cmpl_async([prompt], limits, prompt_extras=extras)
                return rendered
        except VLLMValidationError as error:
            refused = too_long(error, request.field, limits.max_input_tokens)
            if refused is None:
                raise
            raise refused from error

    async def _pool_in_chunks(
        self,
        chunks: EmbedIOProcessor,
        engine_input: Any,
        params: PoolingParams,
        request: EmbeddingRequest,
        adapter: LoRARequest | None,
    ) -> PoolingRequestOutput:
        """What vLLM makes of the vectors of an input's pieces, each as long as the context: their weighted mean."""
        context: Any = PoolingServeContext(
            request=request.openai,
            model_name="",
            request_id=request.request_id,
            pooling_params=params,
            lora_request=adapter,
            priorities=0,
            prompt_extras=None,
        )
        context.engine_inputs = [
            PoolingEngineInput(prompts=engine_input, params=params, lora_requests=adapter, priorities=0)
        ]
        chunks.maybe_pre_process_chunked(context)
        pieces = [each["prompts"] for each in context.engine_inputs]
        lengths = [extract_prompt_len(self._llm.model_config, piece) for piece in pieces]
        admit_together(self._llm, request.field, len(lengths), sum(lengths[:-1]))
        async with task_group() as group:
            tasks = [
                group.create_task(pool(self._llm, piece, params, request.request_id, lora_request=adapter))
                for piece in pieces
            ]
        context.final_res_batch = [task.result() for task in tasks]
        await in_thread(chunks.post_process_online, context)
        (output,) = context.final_res_batch
        return output


def embedding_result(data: Any, prompt_tokens: int) -> pb.EmbeddingResult:
    """A tensor `[dim]`, or one `[tokens, dim]` of a model that doesn't pool, as the wire has it."""
    numbers = data.float().numpy().astype("<f4", copy=False)
    # Packed floats and bytes look alike on the wire, and both fields are the first of their message. Number by number
    # takes 40 times as long, in the event loop: 5 ms for 512 tokens of 384 numbers.
    result = pb.EmbeddingResult.FromString(BytesValue(value=numbers.tobytes()).SerializeToString())
    pooled = numbers.ndim == 1
    result.tokens = 1 if pooled else numbers.shape[0]
    result.dim = numbers.shape[-1]
    result.prompt_tokens = prompt_tokens
    result.layout = pb.EMBEDDING_LAYOUT_FINAL if pooled else pb.EMBEDDING_LAYOUT_PER_TOKEN
    return result
