"""The vocabulary of a GGUF file: what transformers leaves out of the tokenizer that it makes of one."""

from typing import Any

from common.gguf_file import GGUFFile

# Tokens that end a turn, by their names: files list but one of them. As in llama.cpp, src/llama-vocab.cpp.
_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<turn|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "<end_of_utterance>",
    }
)
# ... which in a vocabulary that has the others ends a part of a turn.
_HARMONY = frozenset({"<|return|>", "<|call|>"})
_NAMED = ("eos", "eot", "eom")


def warning(file: GGUFFile) -> str | None:
    """What is not as exact as could be in the tokenizer that transformers makes of the file."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    split = file.metadata.get("tokenizer.ggml.pre", "default")
    if file.metadata.get("tokenizer.ggml.model") != "gpt2" or split in {*GGUF_PRE_TOKENIZER_SPLITS, *_PLAIN}:
        return None
    return f"transformers splits text as GPT-2's tokenizer does, not as {split!r}; Tokenizer takes a more exact one"


def complete(tokenizer: Any, file: GGUFFile) -> None:
    """Have `tokenizer`, which transformers made of the file, begin prompts as the file says."""
    bos = file.metadata.get("tokenizer.ggml.bos_token_id")
    wanted = file.metadata.get("tokenizer.ggml.add_bos_token")
    if bos is None or wanted is None:
        return
    if wanted != (tokenizer("a").input_ids[:1] == [bos]):
        _begin_with(tokenizer, file.words[bos] if wanted else None, bos)


# Names of GPT-2's own split.
_PLAIN = ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling")


def ends(file: GGUFFile) -> list[int]:
    """The ids of the tokens that end an answer, in order."""
    named = {file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _NAMED}
    ends = _ENDS - {"<|end|>"} if set(file.words) >= _HARMONY else _ENDS
    return sorted(
        {*(each for each in named if each is not None), *(i for i, word in enumerate(file.words) if word in ends)}
    )


def _begin_with(tokenizer: Any, bos: str | None, bos_id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    head = [bos] if bos is not None else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*head, "$A"],
        pair=[*head, "$A", *head, "$B"],
        special_tokens=[(bos, bos_id)] if bos is not None else [],
    )
