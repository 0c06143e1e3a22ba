"""What the toys of random weights share: a tokenizer made on the spot, and how their weights are written."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 512
CONTEXT = 2048
SEED = 7
SPREAD = 0.5  # of the random weights: wide enough that the answers hang on each token

Tokenizer = Any  # transformers' classes are untyped


def tokenizer(special: list[str], template: str, text: str, tokens: Mapping[str, str]) -> Tokenizer:
    """A byte-level BPE, trained on `template` and `text`.

    The first three of `special` are pad, bos and eos; `tokens` names others, as attributes.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([template, text], trainer)
    pad, bos, eos = special[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=dict(tokens),
        chat_template=template,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def save(model_class: Any, config: Any, into: Path, rename: Callable[[str], str] = str) -> None:
    """Write `config` and random float32 weights of `model_class`; `rename` makes vLLM's names of transformers'."""
    import torch
    from safetensors.torch import load_file, save_file

    config.architectures = [model_class.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = model_class(config).float()
    model.save_pretrained(into)
    file = into / "model.safetensors"
    weights: Mapping[str, Any] = load_file(file)
    save_file({rename(name): tensor for name, tensor in weights.items()}, file, metadata={"format": "pt"})


def without_doubles(name: str) -> str:
    """vLLM's name of a text model's weight, of which transformers 5 writes one level twice."""
    return name.replace("language_model.model.model.", "language_model.model.")


def text_fields(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of a text model's configuration: two layers of two heads."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT,
        "initializer_range": SPREAD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
