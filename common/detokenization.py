"""vLLM's outputs, taken apart into what each token added to the text.

vLLM merges what a consumer has not taken yet, and parsers of its older kind do one thing per piece: of a piece with
more in it they lose the rest. Fed token by token, each with its text, they answer alike at every speed and with any
stop strings.
"""

import collections
from typing import TYPE_CHECKING, cast

from vllm.outputs import RequestOutput
from vllm.parser.abstract_parser import Parser
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer, IncrementalDetokenizer

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

Piece = tuple[str, list[int], bool]
"""Text, token ids, and whether the answer ends with it."""


class TokenByToken:
    """The outputs of one request, in pieces of at most one token, each with the text that is its own.

    With stop strings vLLM holds text back, as much as may yet turn out to be one, but not the tokens: a parser that
    sees the end of a thought before its last words puts them elsewhere. Here a token waits for its text, and one whose
    text a stop string has cut is left out; what is left of its text has tokens of its own where `tells_ids`, for a
    parser that reads those alone. Without, nothing is detokenized twice before the first output that has more than one
    token.
    """

    def __init__(
        self, tokenizer: TokenizerLike, params: SamplingParams, prompt_ids: list[int], *, tells_ids: bool = False
    ) -> None:
        self._tells_ids = tells_ids
        self._tokenizer = tokenizer
        self._params = params
        self._prompt_ids = prompt_ids
        self._is_held_back = may_hold_back(params)
        self._behind: list[int] = []
        self._waiting: collections.deque[tuple[int, int]] = collections.deque()  # with the lengths of their texts
        self._text = ""
        self._length = 0
        self._detokenizer: BaseIncrementalDetokenizer | None = None

    def pieces(self, output: RequestOutput) -> list[Piece]:
        """`output`, a delta, in pieces; the texts of all pieces of a request concatenate to its own."""
        completion = output.outputs[0]
        token_ids, finished = list(completion.token_ids), completion.finish_reason is not None
        if len(token_ids) < 2 and not self._is_held_back:
            self._behind += token_ids
            return [(completion.text, token_ids, finished)]
        # The text of a token that ends the answer is left out, unlike that of a stop string's last token.
        stop_token = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
        self._take(token_ids, stop_token=stop_token)
        self._text += completion.text
        pieces: list[Piece] = []
        text, at = self._text, 0
        while self._waiting and at + self._waiting[0][1] <= len(text):
            token_id, length = self._waiting.popleft()
            last = finished and not self._waiting and at + length == len(text)
            pieces.append((text[at : at + length], [token_id], last))
            at += length
        self._text = text[at:]
        if not self._is_held_back and (self._waiting or self._text):  # never seen; a text is not to be lost for it
            pieces.append((self._text, [token_id for token_id, _ in self._waiting], finished))
            self._text, self._waiting = "", collections.deque()
        elif finished and not (pieces and pieces[-1][2]):
            told = self._tokenizer.encode(self._text, add_special_tokens=False) if self._tells_ids else []
            pieces.append((self._text, told, True))
        return pieces

    def _take(self, token_ids: list[int], *, stop_token: bool) -> None:
        """Let `token_ids` wait, each with the length of the text that it adds."""
        if self._detokenizer is None:
            self._detokenizer = _detokenizer(self._tokenizer, self._params, self._prompt_ids)
        detokenizer = self._detokenizer
        if self._behind:
            detokenizer.update(self._behind, stop_terminated=False)
            self._behind, self._length = [], len(detokenizer.output_text)
        for left, token_id in enumerate(token_ids, 1 - len(token_ids)):
            detokenizer.update([token_id], stop_terminated=stop_token and left == 0)
            before, self._length = self._length, len(detokenizer.output_text)
            self._waiting.append((token_id, self._length - before))


def may_hold_back(params: SamplingParams) -> bool:
    """Whether vLLM gives out a token before its text, or without."""
    return bool(params.stop) and not params.include_stop_str_in_output


def _detokenizer(tokenizer: TokenizerLike, params: SamplingParams, prompt_ids: list[int]) -> BaseIncrementalDetokenizer:
    """As the engine's, but that it knows no stop strings."""
    request = _Request(
        SamplingParams(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
        ),
        prompt_ids,
    )
    made = IncrementalDetokenizer.from_new_request(tokenizer, cast("EngineCoreRequest", request))
    return cast("BaseIncrementalDetokenizer", made)  # there is a tokenizer


class _Request:
    """What a detokenizer reads of an engine's request."""

    prompt_embeds = None
    request_id = ""

    def __init__(self, sampling_params: SamplingParams, prompt_token_ids: list[int]) -> None:
        self.sampling_params = sampling_params
        self.prompt_token_ids = prompt_token_ids


def reads_one_token(parser: Parser) -> bool:
    """Whether a part of `parser` is of vLLM's older kind."""
    parts = (parser.reasoning_parser, parser.tool_parser)
    return any(part is not None and not part.engine_based_streaming for part in parts)
