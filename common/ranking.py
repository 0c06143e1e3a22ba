"""Rerank: documents in the order in which they answer a query, by vLLM's own scoring code."""

import asyncio
import dataclasses
import math
import uuid
from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.pooling.scoring.io_processor import (
    CrossEncoderIOProcessor,
    JinaRankingIOProcessor,
    ScoringIOProcessors,
)
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest
from vllm.entrypoints.pooling.typing import PoolingServeContext
from vllm.outputs import PoolingRequestOutput, ScoringRequestOutput
from vllm.renderers.chat_utils import ChatTemplateConfig
from vllm.renderers.inputs.preprocess import extract_prompt_len
from vllm.tasks import SCORE_TYPE_MAP

from common.concurrency import in_thread, task_group
from common.engine import Engine
from common.errors import InvalidRequest, LoadFailed
from common.lora import Adapters
from common.pb import backend_pb2 as pb
from common.pooling import pool
from common.reranker_files import ScoreTemplate, score_template
from common.tokens import MOST_CHARACTERS
from common.vllm_errors import admit, admit_together, translated
from common.wording import first_problem

# Characters of all pairs that a cross-encoder reads: vLLM tokenizes the query anew with each document, in a thread that
# all inputs share.
MOST_OF_PAIRS = 20_000_000


class Ranker:
    """Ranks documents with the loaded model.

    A cross-encoder reads the query with each document. Other models embed the query once and each document by itself,
    and compare: vectors by their cosine, one vector per token by MaxSim.

    Making one takes seconds: vLLM imports the model's class. `template` is the user's own.

    Raises:
        InvalidRequest: a template for a model that has no use for one.
        LoadFailed: vLLM can't rank with the model's tokenizer.

    """

    def __init__(self, engine: Engine, adapters: Adapters, template: str | None) -> None:
        self._llm = engine.llm
        self._config = engine.llm.model_config
        self._adapters = adapters
        kind = SCORE_TYPE_MAP[engine.abilities.pooling]
        if self._config.architecture == "JinaForRanking":
            kind = JinaRankingIOProcessor.name  # it reads all documents at once
        if kind == CrossEncoderIOProcessor.name:
            found = score_template(self._config, engine.llm.renderer.get_tokenizer(), template)
        elif template is None:
            found = ScoreTemplate()
        else:
            raise InvalidRequest("Options", f"score_template: a {kind} reads query and documents apart, without one")
        self._template_kwargs = found.kwargs
        self._reads_pairs = kind == CrossEncoderIOProcessor.name
        try:
            self._processor = ScoringIOProcessors[kind](
                vllm_config=engine.llm.vllm_config,
                renderer=engine.llm.renderer,
                chat_template_config=ChatTemplateConfig(chat_template=found.text),
            )
        except ValueError as error:
            raise LoadFailed(first_problem(error)) from error

    async def rank(self, request: pb.RerankRequest) -> pb.RerankResult:
        """The best documents, the most relevant first; those of equal relevance in the order of the request.

        Raises:
            InvalidRequest: nothing to rank, a document that does not fit the model's context, or more than is ever
                admitted.
            Overloaded: an admission limit is reached.

        """
        most = self._llm.vllm_config.scheduler_config.max_num_queued_reqs - 1
        check(request, most, reads_pairs=self._reads_pairs)
        documents = list(request.documents)
        admit(self._llm, len(documents) + 1)
        context = self._context(request.query, documents)
        inputs = await self._render(context, len(documents))
        lengths = [extract_prompt_len(self._config, each["prompts"]) for each in inputs]
        admit_together(self._llm, "documents", len(lengths), sum(lengths[:-1]))
        scores = await self._scores(context, inputs, len(documents))
        tokens = sum(lengths)
        return pb.RerankResult(
            usage=pb.Usage(total_tokens=tokens, prompt_tokens=tokens),
            results=[
                pb.DocumentResult(index=index, text=documents[index], relevance_score=scores[index])
                for index in best_first(scores)[: request.top_n or None]
            ],
        )

    def _context(self, query: str, documents: list[str]) -> PoolingServeContext:
        """What vLLM's server would keep of such a request."""
        request = RerankRequest(query=query, documents=documents)
        params = self._processor.create_pooling_params(request)
        params.verify(self._config)
        return PoolingServeContext(
            request=request,
            model_name=self._config.model,
            request_id=f"rank-{uuid.uuid4().hex}",
            pooling_params=params,
            lora_request=self._adapters.pick(""),
            priorities=0,
            prompt_extras={"chat_template_kwargs": self._template_kwargs},
        )

    async def _render(self, context: PoolingServeContext, documents: int) -> list[Any]:
        """The engine's inputs: the query's first where it is one by itself, then those of the documents."""
        parameters = self._processor.get_request_factory_online(context)
        fields = input_fields(len(parameters), documents)
        async with task_group() as group:
            tasks = [group.create_task(self._rendered(*each)) for each in zip(fields, parameters, strict=True)]
        return [task.result() for task in tasks]

    async def _rendered(self, field: str, parameters: Any) -> Any:
        with translated(field):
            return await self._processor.render_async(parameters)

    async def _scores(self, context: PoolingServeContext, inputs: list[Any], documents: int) -> list[float]:
        """The relevance of each document. All are in the engine at once; the first failure aborts the rest."""
        fields = input_fields(len(inputs), documents)
        queries = max(0, len(inputs) - documents)
        async with task_group() as group:
            query = [group.create_task(self._pool(fields[i], inputs[i])) for i in range(queries)]
            tasks = [
                group.create_task(self._scored(context, query, fields[i], inputs[i]))
                for i in range(queries, len(inputs))
            ]
        scores = [score for task in tasks for score in task.result()]
        if len(scores) != documents or any(map(math.isnan, scores)):
            msg = f"the model gave {len(scores)} scores for {documents} documents, or some that are not numbers"
            raise ValueError(msg)
        return scores

    async def _pool(self, field: str, engine_input: Any) -> PoolingRequestOutput:
        with translated(field):
            return await pool(
                self._llm,
                engine_input["prompts"],
                engine_input["params"],
                lora_request=engine_input["lora_requests"],
            )

    async def _scored(
        self,
        context: PoolingServeContext,
        query: Sequence[asyncio.Task[PoolingRequestOutput]],
        field: str,
        engine_input: Any,
    ) -> list[float]:
        document = await self._pool(field, engine_input)
        outputs = [*[await task for task in query], document]
        # Compared as they come: to keep one vector per token of all documents would take much memory.
        return await in_thread(self._compare, dataclasses.replace(context, final_res_batch=outputs))

    def _compare(self, context: PoolingServeContext) -> list[float]:
        self._processor.post_process_online(context)
        return [ScoringRequestOutput.from_base(output).outputs.score for output in context.final_res_batch]


def check(request: pb.RerankRequest, most: int, *, reads_pairs: bool = False) -> None:
    """Raise InvalidRequest where there is nothing to rank, more than `most` documents, or megabytes to tokenize.

    A model that `reads_pairs` has the query tokenized anew with each document.
    """
    if not request.query:
        raise InvalidRequest("query", "is empty")
    if not request.documents:
        raise InvalidRequest("documents", "is empty; give at least one")
    if len(request.documents) > most:
        raise InvalidRequest(
            "documents", f"has {len(request.documents)}; at most {most} are ranked at a time (--max-waiting-requests)"
        )
    fields = ["query", *(f"documents[{index}]" for index in range(len(request.documents)))]
    for field, text in zip(fields, [request.query, *request.documents], strict=True):
        if len(text) > MOST_CHARACTERS:
            raise InvalidRequest(field, f"has {len(text)} characters; use at most {MOST_CHARACTERS}")
    written = len(request.query) * len(request.documents) + sum(map(len, request.documents))
    if reads_pairs and written > MOST_OF_PAIRS:
        raise InvalidRequest(
            "documents", f"have, each with the query, {written} characters together; use at most {MOST_OF_PAIRS}"
        )
    if request.top_n < 0:
        raise InvalidRequest("top_n", f"{request.top_n} is negative; use how many of the best to return, or 0 for all")


def best_first(scores: Sequence[float]) -> list[int]:
    """The indices of `scores`, highest score first, then lowest index."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))


def input_fields(inputs: int, documents: int) -> list[str]:
    """What the engine's inputs for so many documents are called on the wire, where one of them is refused."""
    if inputs > documents:
        return ["query", *(f"documents[{index}]" for index in range(documents))]
    if inputs == documents:
        return [f"query with documents[{index}]" for index in range(documents)]
    return ["query with documents"]
