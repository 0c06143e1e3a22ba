"""Requests that tell the engine's log-probabilities of given tokens.

A *replay* has the engine read context and candidate as one prompt and report each prompt token's log-probability. That
is one request a candidate, but none of them may read the prefix cache: each computes the context anew.

A *step* asks for one token behind the context and what the candidate has before it: the only token that may be sampled
is the wanted one, and its log-probability is the model's own, from before that constraint. That is one request a token,
but all of them share the full blocks of the context, with each other and with whatever was asked before.

vLLM's `logprob_token_ids`, made for the same, is not used: its first model runner gives the other requests of the batch
that ask for alternatives none then.
"""

import dataclasses
from typing import Any, Protocol

from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

Tokens = tuple[int, ...]


class Probe(Protocol):
    """One request to the engine."""

    @property
    def token_ids(self) -> list[int]:
        """The prompt."""

    @property
    def params(self) -> SamplingParams:
        """How to ask. Whether the prefix cache is read is left to vLLM: a replay that reads it ends the engine."""

    def read(self, output: RequestOutput) -> list[float]:
        """The log-probabilities of the probe's tokens, in order."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """All tokens of a candidate by one prompt."""

    context: Tokens
    candidate: Tokens

    @property
    def token_ids(self) -> list[int]:
        """See `Probe`."""
        return [*self.context, *self.candidate]

    @property
    def params(self) -> SamplingParams:
        """See `Probe`."""
        return _params(prompt_logprobs=0, flat_logprobs=True)

    def read(self, output: RequestOutput) -> list[float]:
        """See `Probe`. vLLM's first entry is None, for the token that has nothing before it."""
        entries, start = output.prompt_logprobs, len(self.context)
        return [entries[start + index][token].logprob for index, token in enumerate(self.candidate)]


class RowReplay(Replay):
    """The same for vLLM's second model runner, which computes the logits of the candidate's tokens alone."""

    @property
    def params(self) -> SamplingParams:
        """See `Probe`."""
        rows = [[token] for token in self.candidate]
        return _params(prompt_logprob_token_ids=rows, prompt_logprob_start=len(self.context) - 1)

    def read(self, output: RequestOutput) -> list[float]:
        """See `Probe`."""
        return [float(row[0]) for row in output.prompt_token_id_logprobs]


@dataclasses.dataclass(frozen=True)
class Step:
    """One token of a candidate."""

    context: Tokens
    before: Tokens
    token: int

    @property
    def token_ids(self) -> list[int]:
        """See `Probe`."""
        return [*self.context, *self.before]

    @property
    def params(self) -> SamplingParams:
        """See `Probe`."""
        return _params(logprobs=0, allowed_token_ids=[self.token], ignore_eos=True)

    def read(self, output: RequestOutput) -> list[float]:
        """See `Probe`."""
        return [output.outputs[0].logprobs[0][self.token].logprob]


def _params(**fields: Any) -> SamplingParams:
    """A request whose one sampled token nobody reads as text."""
    return SamplingParams(
        temperature=0, max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **fields
    )
