"""A written answer through our loop and through vLLM's own OpenAI server, over an engine that recites it.

Real are vLLM's detokenizer, its renderer's changes to the request, its parsers and its server, and `common.generation`.
Made up are the engine, which yields the answer in the pieces it is told to, and the chat template.
"""

import dataclasses
import json
import re
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from common.detokenization import reads_one_token
from common.generation import REPLACEMENT, Run
from common.generator import Generator
from common.lora import NO_ADAPTERS, Adapters
from common.parsers import ParserChoice
from common.request import GenerationRequest
from tests.parsers.cases import TOOLS, Case, Format
from tests.parsers.tokenizer import encode, tokenizer_for

if TYPE_CHECKING:
    from common.reply import ToolCall

NAME = "recital"
MAX_MODEL_LEN = 100_000
_HALF = re.compile("[\ud800-\udfff]")
_PARSER_ROOMS = ("tool_parsers", "reasoning", "parser", "chat_parsing")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a client gets: arguments as text, `error` where it gets one in place of the end.

    Attributes:
        halved: a surrogate pair came in halves, which vLLM's server can not write and ends the stream instead.

    """

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    error: bool = False
    halved: bool = dataclasses.field(default=False, compare=False)


class Reciter:
    """What `AsyncLLM` is to its users, with one answer to everything.

    Attributes:
        answer: token ids, the one that ends it included.
        splits: how many tokens come in each piece, asked for when it is taken; what is left comes in the last.

    """

    errored = False
    input_processor = mm_processor = None
    vllm_config = SimpleNamespace(scheduler_config=None)

    def __init__(self, form: Format) -> None:
        self.tokenizer = tokenizer_for(form.special, form.added, **form.tokenizer)
        self._special = form.special
        self._stops = form.stops
        self.renderer = self
        hf_config = SimpleNamespace(model_type=form.model_type)
        self.model_config = SimpleNamespace(
            model=NAME,
            hf_config=hf_config,
            hf_text_config=hf_config,
            hf_overrides={},
            max_model_len=MAX_MODEL_LEN,
            max_logprobs=20,
            multimodal_config=None,
            enable_prompt_embeds=False,
            generation_config="vllm",
            override_generation_config={},
            is_encoder_decoder=False,
            get_diff_sampling_param=dict,
            architecture=None,
        )
        self.prompt: list[int] = []
        self.answer: list[int] = []
        self.splits: Iterable[int] = ()
        self.cut = False

    def recite(self, prompt: str, case: Case) -> None:
        """Take up another answer."""
        self.prompt = encode(self.tokenizer, prompt, self._special)
        self.answer = encode(self.tokenizer, case.raw, self._special)
        self.cut = case.cut
        if not case.cut and not case.raw.endswith(self._stops or "\0"):
            self.answer.append(self.tokenizer.eos_token_id)

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def check_admission(self, _count: int) -> None:
        pass

    async def render_chat_async(self, *_args: Any, **_kwargs: Any) -> Any:
        return ([],), (tokens_input(self.prompt),)

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **_kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        # gpt-oss' prompt is rendered by vLLM itself.
        prompt_ids = prompt["prompt_token_ids"]
        request = SimpleNamespace(
            sampling_params=params, prompt_token_ids=prompt_ids, prompt_embeds=None, request_id=request_id
        )
        detokenizer = IncrementalDetokenizer.from_new_request(self.tokenizer, cast("Any", request))
        delta = params.output_kind == RequestOutputKind.DELTA
        length = self._length(params)
        ends = chain((end for end in self._ends() if end < length), [length]) if delta else [length]
        begin = 0
        for end in ends:
            finished = end == length
            piece = self.answer[begin:end]
            stop = detokenizer.update(list(piece), end == len(self.answer) and not self.cut)
            text = detokenizer.get_next_output_text(finished, delta)
            reason = ("length" if self.cut and not stop else "stop") if finished else None
            completion = CompletionOutput(0, text, piece, None, None, finish_reason=reason, stop_reason=stop)
            yield RequestOutput(request_id, None, prompt_ids, None, [completion], finished)
            begin = end

    def _length(self, params: SamplingParams) -> int:
        """How many tokens of the answer there are, to the one that completes a stop string."""
        request = SimpleNamespace(sampling_params=params, prompt_token_ids=[], prompt_embeds=None, request_id="")
        detokenizer = IncrementalDetokenizer.from_new_request(self.tokenizer, cast("Any", request))
        ends = (length for length, token in enumerate(self.answer, 1) if detokenizer.update([token], False))
        return next(ends, len(self.answer)) if params.stop else len(self.answer)

    def _ends(self) -> Iterator[int]:
        end = 0
        for length in self.splits:
            end += length
            if end >= len(self.answer):
                break
            yield end


class Bench:
    """Both ways to read one format with one pair of parsers.

    Of vLLM's text U+FFFD is taken out, which our loop leaves out by intent.

    Attributes:
        token_by_token: whether we split the engine's output for these parsers.

    """

    def __init__(self, form: Format, tool: str | None, reasoning: str | None) -> None:
        self.format = form
        self.tool = tool
        self.reciter = llm = Reciter(form)
        self.generator = Generator(cast("Any", llm), ParserChoice(tool, reasoning, "as asked"), Adapters(NO_ADAPTERS))
        parsers = {"enable_auto_tools": tool is not None, "tool_parser": tool, "reasoning_parser": reasoning or ""}
        models = OpenAIServingModels(cast("Any", llm), [BaseModelPath(name=NAME, model_path=NAME)])
        self.server = OpenAIServingChat(
            cast("Any", llm),
            models,
            "assistant",
            online_renderer=self.generator.renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            **parsers,
        )

    @property
    def token_by_token(self) -> bool:
        parser = self.generator.parser(self._request(stream=True))
        return parser is not None and reads_one_token(parser)

    def take_up(self, case: Case) -> int:
        """Recite this case from now on; how many tokens it has."""
        form = self.format
        prompts = {None: (form.usual_prompt, {}), False: (form.prompt, form.kwargs)}
        prompt, self._kwargs = prompts.get(case.thinks, (form.thinking_prompt, form.thinking_kwargs))
        self.reciter.recite(prompt, case)
        return len(self.reciter.answer)

    def _request(self, *, stream: bool, stop: Sequence[str] = ()) -> ChatCompletionRequest:
        tools = {"tools": TOOLS, "tool_choice": "auto"} if self.tool else {}
        messages = [{"role": "user", "content": "hello"}]
        kwargs = {"chat_template_kwargs": self._kwargs} if self._kwargs else {}
        return ChatCompletionRequest(model=NAME, messages=messages, stream=stream, stop=list(stop), **tools, **kwargs)

    def run(self, *, stream: bool, stop: Sequence[str] = ()) -> Run:
        """Our loop, about to begin."""
        return Run(self.generator, GenerationRequest(self._request(stream=stream, stop=stop), "r", None, None))

    async def ours_whole(self, stop: Sequence[str] = ()) -> Outcome:
        try:
            completion = await self.run(stream=False, stop=stop).whole()
        except Exception as error:  # noqa: BLE001  # whatever a parser raises is its result
            _raise_unless_a_parsers(error)
            return Outcome(error=True)
        calls = tuple((call.name, _paired(call.arguments)) for call in completion.tool_calls)
        return Outcome(completion.content, completion.reasoning, calls)

    async def ours_streamed(self, splits: Iterable[int], stop: Sequence[str] = ()) -> Outcome:
        """With stop strings the engine holds text back until it knows, and ends where there is one."""
        self.reciter.splits = splits
        content, reasoning, error = "", "", False
        fragments: list[ToolCall] = []
        try:
            async for delta in self.run(stream=True, stop=stop).deltas():
                content += delta.content
                reasoning += delta.reasoning
                fragments += delta.tool_calls
        except Exception as problem:  # noqa: BLE001  # as above
            _raise_unless_a_parsers(problem)
            error = True
        merged = _merged((f.index, f.name, f.arguments) for f in fragments)
        return Outcome(content, reasoning, merged, error, any(_HALF.search(f.arguments) for f in fragments))

    async def theirs_whole(self) -> Outcome:
        try:
            response: Any = await self.server.create_chat_completion(self._request(stream=False))
        except Exception as error:  # noqa: BLE001  # as above
            _raise_unless_a_parsers(error)
            return Outcome(error=True)
        message = response.choices[0].message
        functions = (call.function for call in message.tool_calls or ())
        calls = tuple((function.name, _paired(function.arguments)) for function in functions)
        return Outcome((message.content or "").replace(REPLACEMENT, ""), message.reasoning or "", calls)

    async def theirs_streamed(self, splits: Sequence[int]) -> Outcome:
        self.reciter.splits = splits
        content, reasoning, error = "", "", False
        fragments: list[tuple[int, str, str]] = []
        events = cast("AsyncIterator[str]", await self.server.create_chat_completion(self._request(stream=True)))
        async for event in events:
            data = event.removeprefix("data: ").strip()
            if data == "[DONE]":
                break
            body = json.loads(data)
            if "error" in body:
                error = True
                continue
            for choice in body["choices"]:
                delta = choice["delta"]
                content += delta.get("content") or ""
                reasoning += delta.get("reasoning") or ""
                for call in delta.get("tool_calls") or ():
                    function = call.get("function") or {}
                    fragments.append((call["index"], function.get("name") or "", function.get("arguments") or ""))
        return Outcome(content.replace(REPLACEMENT, ""), reasoning, _merged(fragments), error)


def _raise_unless_a_parsers(error: Exception) -> None:
    """Raise again what went wrong elsewhere: here."""
    frames = traceback.extract_tb(error.__traceback__)
    if not any(Path(frame.filename).parent.name in _PARSER_ROOMS for frame in frames):
        raise error


def _merged(fragments: Iterable[tuple[int, str, str]]) -> tuple[tuple[str, str], ...]:
    calls: dict[int, list[str]] = {}
    for index, name, arguments in fragments:
        merged = calls.setdefault(index, ["", ""])
        merged[0] += name
        merged[1] += arguments
    return tuple((name, _paired(arguments)) for _, (name, arguments) in sorted(calls.items()))


def _paired(text: str) -> str:
    """Halves of surrogate pairs, each of which may have come by itself, become characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
