"""render -> generate -> parse: one request's way through vLLM, as a stream of typed deltas or as a whole.

The loop is the one of vLLM's own OpenAI server, which is what answers are compared with. A stream asks the engine for
DELTA outputs; a whole answer for FINAL_ONLY, so that nothing is done per token.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import Any

from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.parser.abstract_parser import Parser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.renderers.inputs.preprocess import extract_prompt_components, extract_prompt_len

from common import pacing, request_context
from common.clock import Clock, ObservedClock
from common.concurrency import in_thread
from common.detokenization import Piece, TokenByToken, may_hold_back, reads_one_token
from common.generator import Generator
from common.grammar import check_tools
from common.logprobs import logprob_texts
from common.observation import Observer
from common.reply import Completion, Delta, ToolCall, Usage, joined
from common.request import GenerationRequest
from common.vllm_errors import admit, check_finish, translated

logger = logging.getLogger(__name__)

# Entries that are written in the event loop; all others wait for a few milliseconds.
_MANY_LOGPROBS = 16
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Run:
    """One request on its way. Use `deltas` or `whole`, once.

    Attributes:
        usage: totals so far; complete when the answer is.
        logprobs: entries of OpenAI's `logprobs.content` as JSON, cumulative; empty where none are asked for.

    """

    def __init__(self, generator: Generator, request: GenerationRequest, observer: Observer | None = None) -> None:
        self._generator = generator
        self._request = request
        self._clock = Clock() if observer is None else ObservedClock(observer)
        self._parser: Parser | None = None
        self._token_by_token: TokenByToken | None = None
        self._halves: dict[int, str] = {}
        self._may_wait = False
        self._parsing_seconds = 0.0
        self.usage = Usage()
        self.logprobs: list[str] = []

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it comes. Closing the iterator makes the engine drop the request."""
        async with contextlib.aclosing(self._outputs()) as outputs:
            with self._generator.pace.answer() as paced:
                async for output in outputs:
                    if (parser := self._parser) is None:
                        if text := _clean(output.outputs[0].text):
                            yield Delta(content=text)
                        continue
                    self._parsing_seconds = 0.0
                    for delta in self._parsed(parser, output):
                        yield delta
                    if self._may_wait:
                        tokens = len(output.outputs[0].token_ids)
                        pause = paced.pause(self._parsing_seconds, tokens)
                        if pause and not output.finished:
                            await asyncio.sleep(pause)
        if self._halves:
            yield Delta(tool_calls=[ToolCall(index, arguments=half) for index, half in self._halves.items()])

    async def whole(self) -> Completion:
        """The answer in one piece."""
        token_ids: Sequence[int] = ()
        text, prompt_ids = "", None
        async with contextlib.aclosing(self._outputs()) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                text, token_ids, prompt_ids = completion.text, completion.token_ids, output.prompt_token_ids
                if self._generator.reads_ids and self._token_by_token and isinstance(completion.stop_reason, str):
                    # In a thread, since all of an answer is detokenized once more.
                    pieces = await in_thread(self._token_by_token.pieces, output)
                    token_ids = [number for _, ids, _ in pieces for number in ids]
        reasoning: str | None = None
        content: str | None = text
        calls: Sequence[Any] = ()
        if (parser := self._parser) is not None:
            parser.set_prompt_token_ids(prompt_ids)
            reasoning, content, parsed = parser.parse(
                text,
                self._request.openai,
                enable_auto_tools=self._generator.has_tool_parser,
                model_output_token_ids=token_ids,
            )
            if self._request.openai.tools and self._request.openai.tool_choice not in (None, "none"):
                calls = (parsed or ())[:1] if self._request.one_call else parsed or ()
        return Completion(
            content=_clean(content or ""),
            reasoning=reasoning or "",
            tool_calls=[
                ToolCall(index, call.id or make_tool_call_id(), call.name, call.arguments)
                for index, call in enumerate(calls)
            ],
            usage=self.usage,
            logprobs=self.logprobs,
        )

    def _parsed(self, parser: Parser, output: RequestOutput) -> Iterable[Delta]:
        if self._token_by_token is not None:
            pieces = self._token_by_token.pieces(output)
        else:
            completion = output.outputs[0]
            pieces = [(completion.text, list(completion.token_ids), completion.finish_reason is not None)]
        if len(pieces) == 1 and len(pieces[0][1]) < 2:
            # Most are one, of one token; a step of a chunked prefill has nothing at all.
            return self._deltas_of(parser, output, pieces[0]) if any(pieces[0]) else ()
        return joined(self._parsed_in_turn(parser, output, pieces))

    def _parsed_in_turn(self, parser: Parser, output: RequestOutput, pieces: Iterable[Piece]) -> Iterator[Delta]:
        for piece in pieces:
            yield from self._deltas_of(parser, output, piece)
            _, token_ids, finished = piece
            if len(token_ids) > 1 and not finished:
                # What vLLM keeps back of such a piece, the text after a call, would come after the next one's.
                yield from self._deltas_of(parser, output, ("", [], False))

    def _deltas_of(self, parser: Parser, output: RequestOutput, piece: Piece) -> Sequence[Delta]:
        text, token_ids, finished = piece
        began = pacing.now() if self._may_wait else 0.0
        message = parser.parse_delta(
            text,
            token_ids,
            self._request.openai,
            prompt_token_ids=output.prompt_token_ids,
            finished=finished,
        )
        if self._may_wait:
            self._parsing_seconds += pacing.now() - began
        if message is None:
            return ()
        deltas = []
        if message.reasoning:
            deltas.append(Delta(reasoning=message.reasoning))
        if message.content and (content := _clean(message.content)):
            deltas.append(Delta(content=content))
        calls = message.tool_calls
        if self._request.one_call:
            calls = [call for call in calls if call.index == 0]
        if calls:
            deltas.append(Delta(tool_calls=[self._fragment(call) for call in calls]))
        return deltas

    def _fragment(self, call: Any) -> ToolCall:
        """With the half of a surrogate pair that the last one of its call ended with, and without its own.

        A model may write a character in two escapes, which parsers give as two halves.
        """
        function = call.function
        name, text = (function.name or "", function.arguments or "") if function else ("", "")
        if self._halves:
            text = self._halves.pop(call.index, "") + text
        if text and "\ud800" <= text[-1] <= "\udbff":
            self._halves[call.index] = text[-1]
            text = text[:-1]
        return ToolCall(call.index, call.id or "", name, text)

    def _fresh_parser(self) -> Parser | None:
        # A raw prompt's answer is text, whatever it looks like.
        return self._generator.parser(self._request.openai) if self._request.is_chat else None

    async def _outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """vLLM's outputs, counted; ends only with an answer that is complete."""
        generator, request = self._generator, self._request
        with translated(request.prompt_field):
            admit(generator.llm)
            adapter = generator.adapters.pick(request.adapter)
            # One is enough: rendering changes nothing that parsers are made with (Mistral's read no template's
            # variables), and being asked about the prompt leaves no trace in them.
            parser = self._parser = self._fresh_parser()
            engine_input = await generator.render(request)
            prompt_ids = extract_prompt_components(generator.model_config, engine_input).token_ids or []
            max_tokens = get_max_tokens(
                generator.model_config.max_model_len,
                request.max_tokens,
                extract_prompt_len(generator.model_config, engine_input),
                generator.default_sampling,
                generator.most_tokens,
            )
            params = request.openai.to_sampling_params(max_tokens, generator.default_sampling)
            if request.has_tools and params.structured_outputs is not None:
                await in_thread(check_tools, params.structured_outputs)
            if parser is not None and (reads_one_token(parser) or may_hold_back(params)):
                self._token_by_token = TokenByToken(
                    generator.llm.get_tokenizer(), params, prompt_ids, tells_ids=generator.reads_ids
                )
            # Read token by token, what comes together costs as much as what comes alone.
            self._may_wait = parser is not None and self._token_by_token is None
            reasoning: dict[str, Any] = {}
            if parser is not None and parser.reasoning_parser is not None:
                # Grammars begin after the thought; the engine must know how the template opened it.
                kwargs = generator.renderer.effective_chat_template_kwargs(request.openai)
                reasoning = {
                    "reasoning_ended": request.openai.resolve_reasoning_ended(parser, prompt_ids),
                    "reasoning_parser_kwargs": {"chat_template_kwargs": kwargs},
                }
            elif not request.is_chat:
                # Nobody parts a thought from this answer, and a grammar is for all of it.
                reasoning = {"reasoning_ended": True}
            self.usage.prompt_tokens = len(prompt_ids)
            self._clock.start(len(prompt_ids))
            async with contextlib.aclosing(
                generator.llm.generate(
                    engine_input,
                    params,
                    request.request_id,
                    lora_request=adapter,
                    trace_headers=request_context.trace_headers.get(),
                    data_parallel_rank=request.rank,
                    **reasoning,
                )
            ) as outputs:
                async for output in outputs:
                    if output.outputs[0].logprobs and request.top_logprobs is not None:
                        await self._keep_logprobs(output.outputs[0], request.top_logprobs)
                    self._count(output)
                    yield output

    async def _keep_logprobs(self, completion: CompletionOutput, top: int) -> None:
        """In a thread where an answer comes in one piece, with tenths of a millisecond for each of its tokens."""
        asked = completion.token_ids, completion.logprobs or [], top
        many = len(completion.token_ids) > _MANY_LOGPROBS
        self.logprobs += await in_thread(logprob_texts, *asked) if many else logprob_texts(*asked)

    def _count(self, output: RequestOutput) -> None:
        completion = output.outputs[0]
        tokens = len(completion.token_ids)
        self.usage.completion_tokens += tokens
        self._clock.tick(tokens)
        if completion.finish_reason is None:
            return
        check_finish(completion.finish_reason)
        self.usage.prompt_ms, self.usage.generation_ms = self._clock.times(output.metrics)
        logger.debug("request %s: %s after %s", self._request.request_id, completion.finish_reason, self.usage)


def _clean(text: str) -> str:
    """Without U+FFFD, which a model writes where its bytes are no character: the orchestrator's stream stalls on it."""
    return text.replace(REPLACEMENT, "") if REPLACEMENT in text else text
