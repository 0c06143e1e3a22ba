"""Outputs that vLLM has merged, taken apart again into what each token added to the text.

vLLM merges what a consumer has not taken yet, and parsers of its older kind do one thing per piece: of a piece with
more in it they lose the rest. Fed token by token they answer alike at every speed.
"""

from typing import TYPE_CHECKING, cast

from vllm.outputs import RequestOutput
from vllm.parser.abstract_parser import Parser
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

Piece = tuple[str, list[int], bool]
"""Text, token ids, and whether the answer ends with it."""


class TokenByToken:
    """The outputs of one request, in pieces of at most one token.

    Nothing is detokenized twice before the first output that has more than one.
    """

    def __init__(self, tokenizer: TokenizerLike, params: SamplingParams, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._prompt_ids = prompt_ids
        self._behind: list[int] = []
        self._detokenizer: IncrementalDetokenizer | None = None

    def pieces(self, output: RequestOutput) -> list[Piece]:
        """`output`, a delta, in pieces; their texts concatenate to its own."""
        completion = output.outputs[0]
        token_ids, finished = list(completion.token_ids), completion.finish_reason is not None
        if len(token_ids) < 2:
            self._behind += token_ids
            return [(completion.text, token_ids, finished)]
        detokenizer = self._caught_up()
        # The text of a token that ends the answer is left out, unlike that of a stop string's last token.
        stop_token = completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)
        pieces: list[Piece] = []
        for left, token_id in enumerate(token_ids, 1 - len(token_ids)):
            last = finished and left == 0
            detokenizer.update([token_id], last and stop_token)
            pieces.append((detokenizer.get_next_output_text(last, delta=True), [token_id], last))
        if "".join(text for text, _, _ in pieces) != completion.text:
            return [(completion.text, token_ids, finished)]  # never seen; a text is not to be lost for it
        return pieces

    def _caught_up(self) -> IncrementalDetokenizer:
        """vLLM's detokenizer, where the engine's stood before the output at hand."""
        if self._detokenizer is None:
            request = _Request(self._params, self._prompt_ids)
            self._detokenizer = IncrementalDetokenizer.from_new_request(
                self._tokenizer, cast("EngineCoreRequest", request)
            )
        self._detokenizer.update(self._behind, stop_terminated=False)
        self._detokenizer.get_next_output_text(finished=False, delta=True)
        self._behind = []
        return self._detokenizer


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
