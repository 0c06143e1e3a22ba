"""Which requests tell the scores of candidates in the fewest tokens of work, and whether so many are admitted."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllm.config import VllmConfig

from common.errors import InvalidRequest, Unsupported
from common.probes import Probe, Replay, RowReplay, Step, Tokens

# vLLM's first model runner computes the logits of all prompt tokens of a step at once, in memory that it has not set
# aside: as float32 logits, as their log-probabilities, and once more while it counts ranks.
_MOST_LOGITS_BYTES = 1 << 30
_BYTES_PER_LOGIT = 3 * 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """Requests, and where in their answers the tokens of candidates are."""

    probes: list[Probe]
    places: list[list[tuple[int, int]]]
    """For each candidate and each of its tokens: (index of the probe, index among what that probe reads)."""


class Cost(NamedTuple):
    """What a plan costs; compared in this order."""

    work: int
    """Tokens that the engine computes, by what its prefix cache holds after the first of them."""
    requests: int
    tokens: int
    """Tokens of all prompts, as admission counts them."""


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What an engine can be asked, and how much of it.

    Attributes:
        context: tokens that prompt and answer may have together.
        requests, tokens: most requests, and most tokens of prompts, that are admitted at a time; None: any number.
        block: tokens of a block of the prefix cache; None without one.
        replay: the kind of replay; None where the engine would answer wrongly or die.
        rows: most tokens of a replay; None: vLLM bounds its memory itself.
        steps: whether log-probabilities of sampled tokens are the model's own.

    """

    context: int
    requests: int | None = None
    tokens: int | None = None
    block: int | None = None
    replay: type[Replay] | None = Replay
    rows: int | None = None
    steps: bool = True

    @classmethod
    def of(cls, config: VllmConfig) -> "Scoring":
        """What an engine of this configuration can be asked.

        Raises:
            Unsupported: nothing that would tell log-probabilities.

        """
        model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
        if model.is_diffusion:
            raise Unsupported("Score needs a model that writes from left to right; the loaded one is a diffusion model")
        if not model.logprobs_mode.endswith("logprobs"):
            raise Unsupported(
                f"Score needs log-probabilities; the model is loaded with logprobs_mode {model.logprobs_mode}"
            )
        # Sampled tokens of speculation come out of a sampler of its own.
        steps = model.logprobs_mode == "raw_logprobs" and config.speculative_config is None
        by_rows = config.use_v2_model_runner and model.max_logprobs != 0
        rows = max(1, _MOST_LOGITS_BYTES // (_BYTES_PER_LOGIT * model.get_vocab_size()))
        replay: type[Replay] | None = RowReplay if by_rows else Replay
        if obstacle := _obstacle(config):
            replay = None
            if not steps:
                raise Unsupported(
                    f"Score can't be answered with {obstacle} together with speculative decoding or logprobs_mode"
                    " processed_logprobs; load the model without one of them"
                )
        return cls(
            context=model.max_model_len,
            requests=scheduler.max_num_queued_reqs,
            tokens=scheduler.max_num_queued_tokens,
            block=cache.block_size if cache.enable_prefix_caching else None,
            replay=replay,
            rows=None if by_rows or scheduler.max_num_batched_tokens <= rows else rows,
            steps=steps,
        )

    def plan(self, context: Tokens, candidates: Sequence[Tokens]) -> Plan:
        """The cheapest requests that tell all candidates; neither `context` nor any of these is empty.

        Raises:
            InvalidRequest: they don't fit the context, or are more than is ever admitted.

        """
        self._check_lengths(len(context), candidates)
        kin = list(_next_of_kin(candidates))
        replays, steps = _replay_cost(len(context), kin), _step_cost(len(context), kin, self.block)
        longest = len(context) + max(map(len, candidates))
        can_replay = self.replay is not None and (self.rows is None or longest <= self.rows)
        ways = [cost for cost, possible in ((replays, can_replay), (steps, self.steps)) if possible]
        if not ways:
            raise InvalidRequest(
                "prompt",
                f"has {longest} tokens with the longest candidate; with speculative decoding or logprobs_mode"
                f" processed_logprobs this model's scores take memory for at most {self.rows}",
            )
        admitted = [cost for cost in ways if self._admits(cost)]
        if not admitted:
            least = min(ways, key=lambda cost: cost[1:])
            raise InvalidRequest(
                "candidates",
                f"these {len(candidates)} make {least.requests} requests with {least.tokens} tokens of prompts;"
                f" {self.requests} requests (--max-waiting-requests) and {self.tokens} tokens (--max-waiting-tokens)"
                " are admitted at a time: send fewer at a time",
            )
        if self.replay is not None and min(admitted) is replays:
            return _replays(self.replay, context, candidates, kin)
        return _steps(context, candidates, kin)

    def _check_lengths(self, prompt: int, candidates: Sequence[Tokens]) -> None:
        # vLLM takes no prompt that fills the context.
        room = self.context - 1 - prompt
        if room < 1:
            raise InvalidRequest(
                "prompt", f"has {prompt} tokens; the context of {self.context} leaves none for a candidate"
            )
        for index, candidate in enumerate(candidates):
            if len(candidate) > room:
                raise InvalidRequest(
                    f"candidates[{index}]",
                    f"has {len(candidate)} tokens; the context of {self.context} leaves {room} behind the prompt",
                )

    def _admits(self, cost: Cost) -> bool:
        return (self.requests is None or cost.requests <= self.requests) and (
            self.tokens is None or cost.tokens <= self.tokens
        )


def _obstacle(config: VllmConfig) -> str:
    """What the engine would answer replays wrongly with, or die of; "" where it does neither."""
    if config.cache_config.kv_sharing_fast_prefill:
        # Prompt tokens skip layers. vLLM refuses prompt_logprobs of 1 and more then; at 0 its worker dies.
        return "kv_sharing_fast_prefill"
    if config.lora_config is not None:
        # An adapter of lm_head is applied by a table with a row for each sampled token, and none for prompt tokens.
        return "LoRA adapters"
    return ""


class _Kin(NamedTuple):
    """A candidate next to the one before it, of all distinct ones in order."""

    tokens: Tokens
    shared: int
    """Tokens that it begins with as that one does."""
    leaf: bool
    """Whether it is no beginning of another."""


def _next_of_kin(candidates: Sequence[Tokens]) -> Iterator[_Kin]:
    distinct = sorted(set(candidates))
    shared = 0
    for index, tokens in enumerate(distinct):
        following = distinct[index + 1] if index + 1 < len(distinct) else ()
        common = next(
            (place for place, (mine, its) in enumerate(zip(tokens, following, strict=False)) if mine != its),
            min(len(tokens), len(following)),
        )
        yield _Kin(tokens, shared, common < len(tokens))
        shared = common


def _replay_cost(context: int, kin: Sequence[_Kin]) -> Cost:
    leaves = [context + len(it.tokens) for it in kin if it.leaf]
    return Cost(sum(leaves), len(leaves), sum(leaves))


def _step_cost(context: int, kin: Sequence[_Kin], block: int | None) -> Cost:
    requests = tokens = work = 0
    longest = 0  # of the prompts so far
    for it in kin:
        prompts = range(context + it.shared, context + len(it.tokens))
        requests += len(prompts)
        tokens += sum(prompts)
        if block is None:
            continue
        cached = min(context + it.shared, longest) // block
        for length in prompts:
            # Full blocks are computed once, but the last token of a prompt always is.
            work += length - min(cached, (length - 1) // block) * block
            cached = max(cached, length // block)
        longest = prompts[-1]
    return Cost(tokens if block is None else work, requests, tokens)


def _replays(kind: type[Replay], context: Tokens, candidates: Sequence[Tokens], kin: Sequence[_Kin]) -> Plan:
    probes: list[Probe] = []
    homes: dict[Tokens, int] = {}
    for it in kin:
        # A candidate that is the beginning of others stands before the first of these.
        homes[it.tokens] = len(probes)
        if it.leaf:
            probes.append(kind(context, it.tokens))
    return Plan(probes, [[(homes[tokens], index) for index in range(len(tokens))] for tokens in candidates])


def _steps(context: Tokens, candidates: Sequence[Tokens], kin: Sequence[_Kin]) -> Plan:
    probes: list[Probe] = []
    homes: dict[Tokens, list[tuple[int, int]]] = {}
    path: list[tuple[int, int]] = []
    for it in kin:
        del path[it.shared :]
        for index in range(it.shared, len(it.tokens)):
            path.append((len(probes), 0))
            probes.append(Step(context, it.tokens[:index], it.tokens[index]))
        homes[it.tokens] = list(path)
    return Plan(probes, [homes[tokens] for tokens in candidates])
