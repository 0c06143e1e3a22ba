"""A toy Llama (2 layers, 64 wide, SmolLM2's vocabulary of 49,152) that says one word after the other for ever.

Each token has one successor, so that what it says is known, is the same at any batch size, and is one piece of plain
text per token: a benchmark's engine costs as little as it can, and what serves it is what is measured. Attention and
MLP are computed like any model's and add nothing; the output layer's row of a token points where the embedding of its
predecessor does.

What it says hangs on the last token of the prompt, which the chat template chooses:

    neither                words
    enable_thinking        <think>, 48 words, </think>, words
    tools                  32 words, a call of `get_weather` whose argument has 56 words, words
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.models import MakeError, ensure, toy

WIDTH = 64
CONTEXT = 4096
WORDS = 512
THOUGHT, BEFORE_CALL, ARGUMENT = 48, 32, 56
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
CALL = ['{"name": "get_weather"', ', "arguments": {"city": "', '"}}']
ENDS = ["\n", "\n\n", "\n\n\n"]  # of the prompt: plain, thinking, with tools
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}{% endfor %}
{{- '<|im_start|>assistant' }}
{{- '\n\n\n' if tools else '\n\n' if enable_thinking else '\n' }}"""


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 25 MB."""
    try:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    from tokenizers import AddedToken

    tokenizer = AutoTokenizer.from_pretrained(ensure("smollm2"))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in [*MARKERS, *CALL]])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(into)
    fields = toy.text_fields(tokenizer) | {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": CONTEXT,
    }
    toy.save(LlamaForCausalLM, LlamaConfig(**fields, tie_word_embeddings=False), into)
    _chain(into / "model.safetensors", _successors(tokenizer))


def _successors(tokenizer: Any) -> list[tuple[int, int]]:
    """Pairs of a token and the one that follows it."""

    def one(text: str) -> int:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise MakeError(f"{text!r} is {len(ids)} tokens of SmolLM2's vocabulary, and not one")
        return int(ids[0])

    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    plain = [
        index
        for index, token in vocabulary
        if token.startswith("Ġ") and len(token) > 3 and token[1:].isascii() and token[1:].islower()
    ]
    parts = iter(plain)
    words, thought, before, argument = (
        [next(parts) for _ in range(n)] for n in (WORDS, THOUGHT, BEFORE_CALL, ARGUMENT)
    )
    think, end_think, call, end_call = map(one, MARKERS)
    name, arguments, close = map(one, CALL)
    plain_end, thinking_end, tools_end = map(one, ENDS)
    chains: Sequence[Sequence[int]] = (
        [plain_end, *words, words[0]],
        [thinking_end, think, *thought, end_think, words[100]],
        [tools_end, *before, call, name, arguments, *argument, close, end_call, words[200]],
    )
    return [pair for chain in chains for pair in itertools.pairwise(chain)]


def _chain(weights: Path, successors: Sequence[tuple[int, int]]) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import normalize

    tensors = load_file(weights)
    embeddings = normalize(tensors["model.embed_tokens.weight"], dim=1)
    rows = torch.zeros_like(embeddings)
    for token, successor in successors:
        rows[successor] += embeddings[token]
    rows = normalize(rows, dim=1)
    said = (embeddings[[token for token, _ in successors]] @ rows.T).argmax(dim=1)
    if said.tolist() != [successor for _, successor in successors]:
        raise MakeError("some token is followed by another one than it should")
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embeddings, rows
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_file(tensors, weights, metadata={"format": "pt"})
