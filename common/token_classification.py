"""TokenClassify: the entities of a text, with their UTF-8 byte offsets."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from vllm import PoolingParams
from vllm.inputs import TokensPrompt, tokens_input
from vllm.renderers.params import TokenizeParams

from common.concurrency import in_thread
from common.engine import Engine
from common.errors import InvalidRequest, Unsupported
from common.lora import Adapters
from common.pb import backend_pb2 as pb
from common.pooling import pool
from common.tokens import MOST_CHARACTERS
from common.vllm_errors import admit, translated

OUTSIDE = "O"  # the label of tokens that belong to no entity


@dataclasses.dataclass(frozen=True)
class Token:
    """The label of a token, and the characters that the token was made of."""

    label: str
    score: float
    start: int
    end: int


class TokenClassifier:
    """Finds entities with the loaded model."""

    def __init__(self, engine: Engine, adapters: Adapters) -> None:
        self._llm = engine.llm
        self._adapters = adapters
        self._labels: Mapping[int, str] = engine.llm.model_config.hf_config.id2label
        self._limits = TokenizeParams(max_total_tokens=engine.llm.model_config.max_model_len, add_special_tokens=True)

    async def classify(self, request: pb.TokenClassifyRequest) -> pb.TokenClassifyResponse:
        """The entities of a text whose score reaches the threshold, by where they start.

        Raises:
            InvalidRequest: a threshold outside of 0 to 1, or a text that is longer than the model's context.
            Overloaded: an admission limit is reached.
            Unsupported: the model's tokenizer can't say where its tokens are.

        """
        text, threshold = request.text, request.threshold
        if not 0 <= threshold <= 1:
            raise InvalidRequest("threshold", f"{threshold:g} is not between 0 and 1")
        if len(text) > MOST_CHARACTERS:
            raise InvalidRequest("text", f"has {len(text)} characters; use at most {MOST_CHARACTERS}")
        if not text:
            return pb.TokenClassifyResponse()
        admit(self._llm)
        with translated("text"):
            encoding = await in_thread(self._encode, text)
            output = await pool(
                self._llm,
                tokens_input(encoding["input_ids"]),
                # The pipeline of Hugging Face takes the softmax, whatever activation the model names.
                PoolingParams(task="token_classify", use_activation=False),
                lora_request=self._adapters.pick(""),
            )
        return await in_thread(self._response, text, threshold, encoding, output.outputs.data)

    def _encode(self, text: str) -> Any:
        """What the tokenizer makes of `text`, which has to fit the model's context."""
        tokenizer = self._llm.renderer.get_tokenizer()
        if not getattr(tokenizer, "is_fast", False):
            raise Unsupported("TokenClassify needs a model with a fast tokenizer, which knows where its tokens are")
        encoding = tokenizer(
            text, return_offsets_mapping=True, return_special_tokens_mask=True, **self._limits.get_encode_kwargs()
        )
        self._limits.apply_post_tokenization(tokenizer, TokensPrompt(prompt_token_ids=encoding["input_ids"]))
        return encoding

    def _response(self, text: str, threshold: float, encoding: Any, logits: torch.Tensor) -> pb.TokenClassifyResponse:
        tokens = classified(logits, self._labels, encoding["offset_mapping"], encoding["special_tokens_mask"])
        found = [entity for entity in entities(tokens) if entity.score >= threshold]
        return pb.TokenClassifyResponse(entities=on_the_wire(text, found))


def classified(
    logits: torch.Tensor, labels: Mapping[int, str], offsets: Iterable[tuple[int, int]], special: Iterable[int]
) -> Iterator[Token]:
    """The likeliest label of each token but those that the tokenizer adds.

    `logits` is [tokens, labels]; `offsets` are half-open, in characters; `special` has 1 for an added token.
    """
    scores, indices = torch.softmax(logits.float(), dim=-1).max(dim=-1)
    for score, index, (start, end), added in zip(scores.tolist(), indices.tolist(), offsets, special, strict=True):
        if math.isnan(score):
            msg = "the model's logits are not numbers"
            raise ValueError(msg)
        if not added:
            yield Token(labels[index], score, start, end)


def entities(tokens: Iterable[Token]) -> Iterator[Token]:
    """Runs of tokens of one kind, as Hugging Face's `aggregation_strategy="simple"` puts them together.

    A run goes on over tokens of the same kind until one that begins (B-) an entity. Its score is the mean of theirs.
    """
    runs: list[list[Token]] = []
    for token in tokens:
        begins, kind = _tag(token.label)
        if runs and not begins and kind == _tag(runs[-1][-1].label)[1]:
            runs[-1].append(token)
        else:
            runs.append([token])
    for run in runs:
        group = run[0].label.split("-", 1)[-1]
        if group != OUTSIDE:
            yield Token(group, sum(token.score for token in run) / len(run), run[0].start, run[-1].end)


def on_the_wire(text: str, found: Iterable[Token]) -> list[pb.TokenClassifyEntity]:
    """Entities at characters of `text` -> at its UTF-8 bytes."""
    byte_at = [0, *itertools.accumulate(len(character.encode()) for character in text)]
    return [
        pb.TokenClassifyEntity(
            entity_group=entity.label,
            start=byte_at[entity.start],
            end=byte_at[entity.end],
            score=entity.score,
            text=text[entity.start : entity.end],
        )
        for entity in found
    ]


def _tag(label: str) -> tuple[bool, str]:
    """Whether a token of this label begins an entity, and of which kind; a label without B- or I- goes on."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label
