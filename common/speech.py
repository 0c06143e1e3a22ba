"""AudioTranscription: an audio file -> clips -> prompts -> text and segments, whole or in deltas.

All clips of a file are in the engine at once; their texts come in the order of the file. The parts are those of vLLM's
own server: the model's class writes the prompts, and cleans what the model says.
"""

import asyncio
import contextlib
import dataclasses
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vllm import CompletionOutput, SamplingParams, envs
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.entrypoints.speech_to_text.base.serving import asr_inter_chunk_separator
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest

from common import request_context
from common.concurrency import to_its_end
from common.engine import Engine
from common.errors import ENGINE_STOPPING, EngineGone, InvalidRequest, Unsupported
from common.lora import Adapters
from common.pb import backend_pb2 as pb
from common.speech_file import FIELD, SECOND, Clip, clips
from common.speech_prompt import TRANSLATED_INTO, Prompter, Task
from common.transcript import Segment, Text, diarized_segments, timed_segments
from common.vllm_errors import admit, admit_together, check_finish, translated

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Transcriber:
    """Transcribes audio files with the loaded model, by its default adapter."""

    def __init__(self, engine: Engine, adapters: Adapters) -> None:
        self.llm = engine.llm
        self.adapter = adapters.pick("")
        self.prompter = Prompter(self.llm)
        self.model_class: Any = self.prompter.model_class
        self.default_sampling: dict[str, Any] = self.llm.model_config.get_diff_sampling_param()
        self._threads = ThreadPoolExecutor(envs.VLLM_MAX_AUDIO_PREPROCESS_WORKERS, thread_name_prefix="speech")

    async def transcribe(self, request: pb.TranscriptRequest) -> pb.TranscriptResult:
        """The whole transcript."""
        run = _Run(self, request, stream=False)
        async with contextlib.aclosing(run.deltas()) as deltas:
            async for _ in deltas:
                pass
        return run.result()

    async def stream(self, request: pb.TranscriptRequest) -> AsyncGenerator[pb.TranscriptStreamResponse, None]:
        """The transcript in deltas, then the final result. Closing the iterator drops the requests.

        Raises:
            Unsupported: speakers are asked for, whom vLLM finds in whole answers only.

        """
        if request.diarize and self.model_class.supports_diarized_transcription:
            raise Unsupported(
                "AudioTranscriptionStream can't tell speakers apart; use AudioTranscription, or leave diarize unset"
            )
        run = _Run(self, request, stream=True)
        async with contextlib.aclosing(run.deltas()) as deltas:
            async for delta in deltas:
                yield pb.TranscriptStreamResponse(delta=delta)
        yield pb.TranscriptStreamResponse(final_result=run.result())

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """The result of what decodes audio or writes prompts, both of which block."""
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except RuntimeError:  # closed
            raise EngineGone(ENGINE_STOPPING) from None
        return await future

    def close(self) -> None:
        """Let go of threads and buffers."""
        self._threads.shutdown(wait=False)


class _Run:
    """One request on its way. Use `deltas` once, then `result`."""

    def __init__(self, transcriber: Transcriber, request: pb.TranscriptRequest, *, stream: bool) -> None:
        self._transcriber = transcriber
        self._request = request
        self._stream = stream
        self._id = f"transcribe-{uuid.uuid4().hex}"
        self._language = ""
        self._seconds = 0.0
        self._separator = " "
        self._text = Text()
        self._segments: list[Segment] = []

    def result(self) -> pb.TranscriptResult:
        """The transcript, once `deltas` has ended."""
        return pb.TranscriptResult(
            text=self._text.whole,
            language=self._language,
            duration=self._seconds,
            segments=[segment.message(index) for index, segment in enumerate(self._segments)],
        )

    async def deltas(self) -> AsyncGenerator[str, None]:
        """The text as it comes. Closing the iterator makes the engine drop the requests."""
        with translated(FIELD):
            admit(self._transcriber.llm)
            task, heard = await self._transcriber.in_thread(self._listen)
            admit_together(self._transcriber.llm, FIELD, len(heard))
            inputs, task = await self._inputs(task, heard)
            lengths = [len(each.get("decoder_prompt", each)["prompt_token_ids"]) for each in inputs]
            admit_together(self._transcriber.llm, FIELD, len(lengths), sum(lengths[:-1]))
            self._seconds = heard[-1].end / SECOND
            self._language = task.language or ""
            written = TRANSLATED_INTO if task.translate else task.language
            self._separator = asr_inter_chunk_separator(written, self._transcriber.model_class.no_space_languages)
            self._text = Text(self._separator)
            async with self._in_flight(inputs, task) as answers:
                for clip, answer in zip(heard, answers, strict=True):
                    async with contextlib.aclosing(self._deltas_of(clip, answer, task)) as deltas:
                        async for delta in deltas:
                            yield delta

    def _listen(self) -> tuple[Task, list[Clip]]:
        prompter = self._transcriber.prompter
        task = prompter.task(self._request)
        prompter.check(task)
        return task, clips(self._request.dst, prompter.speech_config(task))

    async def _inputs(self, task: Task, heard: Sequence[Clip]) -> tuple[list[Any], Task]:
        """The engine input of each clip; and the task, with its language where that was detected."""
        transcriber, prompter = self._transcriber, self._transcriber.prompter
        if task.language is None and prompter.detects:
            task = dataclasses.replace(task, language=await self._language_of(heard[0]))
        with translated("language"):
            prompts = await transcriber.in_thread(prompter.prompts, task, [clip.samples for clip in heard])
        inputs = await transcriber.llm.renderer.render_cmpl_async(prompts)
        if task.previous and task.timed:
            self._mend_previous(inputs)
        return inputs, task

    def _mend_previous(self, inputs: Sequence[Any]) -> None:
        """Take away the start token that vLLM puts in front of the previous text, where Whisper expects none."""
        # Whisper was trained with as many tokens of it at most.
        most = self._transcriber.llm.model_config.max_model_len // 2 - 1
        start = self._transcriber.prompter.start_token
        for engine_input in inputs:
            decoder = engine_input["decoder_prompt"]
            ids = decoder["prompt_token_ids"]
            if ids[0] == start and start in ids[1:]:
                ids = decoder["prompt_token_ids"] = ids[1:]
            if (length := ids.index(start) - 1) > most:
                raise InvalidRequest("prompt", f"has {length} tokens; {most} are allowed")

    async def _language_of(self, clip: Clip) -> str:
        transcriber, prompter = self._transcriber, self._transcriber.prompter
        (engine_input,) = await transcriber.llm.renderer.render_cmpl_async([prompter.detection(clip.samples)])
        params = SamplingParams(max_tokens=1, temperature=0, allowed_token_ids=prompter.language_tokens)
        tokens: list[int] = []
        async with contextlib.aclosing(self._outputs(engine_input, params, "language")) as outputs:
            async for output in outputs:
                tokens += output.token_ids
        return str(transcriber.model_class.parse_language_detection_output(tokens, transcriber.prompter.tokenizer))

    def _sampling(self, task: Task) -> SamplingParams:
        llm, defaults = self._transcriber.llm, self._transcriber.default_sampling
        wanted = TranscriptionRequest.model_construct(temperature=task.temperature, stream=self._stream)
        return wanted.to_sampling_params(get_max_tokens(llm.model_config.max_model_len, None, 0, defaults), defaults)

    @contextlib.asynccontextmanager
    async def _in_flight(
        self, inputs: Sequence[Any], task: Task
    ) -> AsyncGenerator[list[AsyncGenerator[CompletionOutput, None]], None]:
        """What the model writes for each of `inputs`, all of which the engine has from the begin."""
        answers = [self._outputs(each, self._sampling(task), str(index)) for index, each in enumerate(inputs)]
        # A request is the engine's once its first output is waited for.
        firsts = [asyncio.ensure_future(anext(answer)) for answer in answers]
        try:
            yield [_with_first(first, answer) for first, answer in zip(firsts, answers, strict=True)]
        finally:
            await to_its_end(_dropped(firsts, answers))

    async def _deltas_of(
        self, clip: Clip, answer: AsyncGenerator[CompletionOutput, None], task: Task
    ) -> AsyncGenerator[str, None]:
        model_class = self._transcriber.model_class
        cleaner = model_class.get_streaming_post_processor_cls()()
        tokens: list[int] = []
        self._text.begin_clip()
        async for output in answer:
            tokens += output.token_ids
            if output.finish_reason == "length":
                logger.info("%s: an answer ended at the model's limit of %d tokens", self._id, len(tokens))
            if self._stream:
                piece = cleaner.process_delta(output.text, output.finish_reason is not None)
            else:
                piece = self._without_speakers(model_class.post_process_output(output.text), task)
            if delta := self._text.add(piece):
                yield delta
        if task.timed:
            prompter = self._transcriber.prompter
            self._segments += timed_segments(
                tokens,
                first_timestamp=prompter.first_timestamp,
                eos=prompter.tokenizer.eos_token_id,
                start=clip.start,
                end=clip.end,
                decode=prompter.tokenizer.decode,
            )

    def _without_speakers(self, text: str, task: Task) -> str:
        """`text`; where the model tells speakers apart, and was to, without their marks, which become segments."""
        model_class = self._transcriber.model_class
        if not (task.diarize and model_class.supports_diarized_transcription):
            return text
        segments = diarized_segments(model_class.parse_diarized_transcript(text))
        self._segments += segments
        return self._separator.join(segment.text for segment in segments) or text

    async def _outputs(
        self, engine_input: Any, params: SamplingParams, suffix: str
    ) -> AsyncGenerator[CompletionOutput, None]:
        outputs = self._transcriber.llm.generate(
            engine_input,
            params,
            f"{self._id}-{suffix}",
            lora_request=self._transcriber.adapter,
            trace_headers=request_context.trace_headers.get(),
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                completion = output.outputs[0]
                check_finish(completion.finish_reason)
                yield completion


async def _with_first(
    first: "asyncio.Future[CompletionOutput]", rest: AsyncGenerator[CompletionOutput, None]
) -> AsyncGenerator[CompletionOutput, None]:
    yield await first
    async for output in rest:
        yield output


async def _dropped(
    firsts: "Sequence[asyncio.Future[CompletionOutput]]", answers: Sequence[AsyncGenerator[CompletionOutput, None]]
) -> None:
    for first in firsts:
        first.cancel()
    await asyncio.gather(*firsts, return_exceptions=True)
    for answer in answers:
        await answer.aclose()
