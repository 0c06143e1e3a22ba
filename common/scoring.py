"""Score: log-probabilities of candidate continuations of a prompt.

Prompt and candidates are tokenised apart and their ids put behind each other, so that no token spans the boundary. A
space that a tokenizer reads before every text is none of a candidate's.
"""

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.renderers.params import TokenizeParams
from vllm.tokenizers.detokenizer_utils import convert_prompt_ids_to_tokens, detokenize_incrementally

from common import request_context
from common.concurrency import in_thread, task_group
from common.engine import Engine
from common.errors import ENGINE_STOPPING, EngineGone, InvalidRequest
from common.logprobs import LOWEST
from common.lora import Adapters
from common.pb import backend_pb2 as pb
from common.probes import Probe, Tokens
from common.score_plan import Plan, Scoring
from common.tokens import MOST_CHARACTERS
from common.vllm_errors import admit, check_finish, translated

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

# What a tokenizer puts around it shows what it puts around any text.
_SAMPLE = "a"
# For private use, so that no vocabulary has tokens in which it and what follows it are one.
_MARK = "\ue000"
# Tokens of the prompt that the texts of a candidate's first tokens can hang on; more than vLLM looks at.
_CONTEXT = 32


@dataclasses.dataclass(frozen=True)
class _Habits:
    """What a tokenizer adds to a text.

    Attributes:
        beginning: before a raw prompt, such as BOS.
        mark: the tokens of `_MARK` where it reads a space before any text, as those of Llama 2 do; else none.

    """

    beginning: Tokens
    mark: Tokens


class Scorer:
    """Scores candidates with the loaded model."""

    def __init__(self, engine: Engine, adapters: Adapters) -> None:
        self._llm = engine.llm
        self._adapters = adapters
        self._habits: _Habits | None = None

    @functools.cached_property
    def _scoring(self) -> Scoring:
        return Scoring.of(self._llm.vllm_config)

    async def score(self, request: pb.ScoreRequest) -> pb.ScoreResponse:
        """The scores of all candidates, in the order of the request, by the model's default adapter.

        All requests to the engine run at once; cancelling aborts them.

        Raises:
            InvalidRequest: nothing to score, or it doesn't fit the context, or is more than is ever admitted.
            Overloaded: more than is admitted now.
            Unsupported: the way the model is loaded leaves no log-probabilities.

        """
        _check_sizes(request, self._scoring.requests)
        with translated("prompt"):
            admit(self._llm)
            adapter = self._adapters.pick("")
            prompt, candidates = await self._tokens(request)
            plan = await in_thread(self._scoring.plan, prompt, candidates)
            admit(self._llm, len(plan.probes))
            outputs = await self._ask_all(plan.probes, adapter)
        # In a thread: there may be a million tokens.
        tokenizer = self._llm.renderer.get_tokenizer() if request.include_token_logprobs else None
        return await in_thread(
            _response, prompt, candidates, plan, outputs, tokenizer, normalize=request.length_normalize
        )

    async def _tokens(self, request: pb.ScoreRequest) -> tuple[Tokens, list[Tokens]]:
        """Those of the prompt, and of each candidate as it goes on."""
        if self._habits is None:
            self._habits = await self._read_habits()
        mark = self._habits.mark
        before = _MARK if mark else ""
        prompt, *marked = await self._token_ids(request.prompt, *(before + text for text in request.candidates))
        prompt = _joined(self._habits.beginning, prompt)
        if not prompt:
            raise InvalidRequest("prompt", "has no token; give a text to continue")
        for index, tokens in enumerate(marked):
            if tokens[: len(mark)] != mark:
                raise InvalidRequest(f"candidates[{index}]", "begins with what has no token; give a text to score")
            if len(tokens) == len(mark):
                raise InvalidRequest(f"candidates[{index}]", "has no token; give a text to score")
        return prompt, [tokens[len(mark) :] for tokens in marked]

    async def _ask_all(self, probes: Sequence[Probe], adapter: LoRARequest | None) -> list["RequestOutput"]:
        call = uuid.uuid4().hex
        async with task_group() as group:
            asked = [
                group.create_task(self._ask(probe, f"score-{call}-{index}", adapter))
                for index, probe in enumerate(probes)
            ]
        return [task.result() for task in asked]

    async def _ask(self, probe: Probe, request_id: str, adapter: LoRARequest | None) -> "RequestOutput":
        last: RequestOutput | None = None
        outputs = self._llm.generate(
            tokens_input(probe.token_ids),
            probe.params,
            request_id,
            lora_request=adapter,
            trace_headers=request_context.trace_headers.get(),
        )
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                last = output
        if last is None:
            raise EngineGone(ENGINE_STOPPING)
        check_finish(last.outputs[0].finish_reason)
        return last

    async def _read_habits(self) -> _Habits:
        """By examples. What is put behind a raw prompt ends a text, and is left out."""
        bare, mark, marked = await self._token_ids(_SAMPLE, _MARK, _MARK + _SAMPLE)
        (whole,) = await self._token_ids(_SAMPLE, special=True)
        starts = (start for start in range(len(whole)) if whole[start : start + len(bare)] == bare)
        adds_space = marked[: len(mark)] == mark and marked[len(mark) :] != bare
        return _Habits(whole[: next(starts, 0)], mark if adds_space else ())

    async def _token_ids(self, *texts: str, special: bool = False) -> list[Tokens]:
        """Of each text by itself; special tokens are read as such, and none is added but for `special`."""
        params = TokenizeParams(max_total_tokens=None, add_special_tokens=special)
        prompts: list[Any] = [{"prompt": text} for text in texts]
        return [
            tuple(prompt["prompt_token_ids"])
            for prompt in await self._llm.renderer.tokenize_prompts_async(prompts, params)
        ]


def candidate_score(logprobs: Sequence[float], texts: Sequence[str], *, normalize: bool) -> pb.CandidateScore:
    """One candidate on the wire; `texts` are those of its tokens, or none where they are not asked for."""
    total = sum(logprobs)
    return pb.CandidateScore(
        log_prob=total,
        length_normalized_log_prob=total / len(logprobs) if normalize else 0.0,
        num_tokens=len(logprobs),
        tokens=[
            pb.TokenLogProb(token=text, log_prob=value) for text, value in zip(texts, logprobs, strict=bool(texts))
        ],
    )


def token_texts(tokenizer: Any, prompt: Tokens, candidate: Tokens) -> list[str]:
    """The text that each token adds, in whole characters: "" for one that a later token of the candidate completes."""
    tokens, prefix, read = convert_prompt_ids_to_tokens(tokenizer, list(prompt[-_CONTEXT:]))
    texts = []
    for token in candidate:
        new, text, prefix, read = detokenize_incrementally(
            tokenizer, [token], tokens, prefix, read, spaces_between_special_tokens=False
        )
        tokens, prefix, read = (tokens + new)[prefix:], 0, read - prefix
        texts.append(text)
    return texts


def _response(
    prompt: Tokens,
    candidates: Sequence[Tokens],
    plan: Plan,
    outputs: Sequence["RequestOutput"],
    tokenizer: Any,
    *,
    normalize: bool,
) -> pb.ScoreResponse:
    """What the engine answered, on the wire; `tokenizer` is None where no tokens are asked for."""
    # JSON, which the orchestrator makes of it, has no infinity.
    read = [[max(LOWEST, value) for value in probe.read(it)] for probe, it in zip(plan.probes, outputs, strict=True)]
    texts = {it: [] if tokenizer is None else token_texts(tokenizer, prompt, it) for it in dict.fromkeys(candidates)}
    scores = [
        candidate_score([read[probe][index] for probe, index in places], texts[candidate], normalize=normalize)
        for candidate, places in zip(candidates, plan.places, strict=True)
    ]
    return pb.ScoreResponse(candidates=scores)


def _joined(beginning: Tokens, prompt: Tokens) -> Tokens:
    """`beginning` before `prompt`, unless a template has written it there already."""
    return prompt if prompt[: len(beginning)] == beginning else beginning + prompt


def _check_sizes(request: pb.ScoreRequest, most: int | None) -> None:
    if not request.candidates:
        raise InvalidRequest("candidates", "is empty; give at least one")
    if most is not None and len(request.candidates) > most:
        raise InvalidRequest(
            "candidates",
            f"has {len(request.candidates)}; no more than {most} requests are admitted at a time"
            " (--max-waiting-requests)",
        )
    length = len(request.prompt) + sum(map(len, request.candidates))
    if length > MOST_CHARACTERS:
        raise InvalidRequest("prompt, candidates", f"have {length} characters together; use at most {MOST_CHARACTERS}")
