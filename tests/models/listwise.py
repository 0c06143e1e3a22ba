"""A toy of Jina's reranker v3 (Qwen3, 1 layer) of random weights, which reads all documents in one prompt.

vLLM has the ids of its two tokens built in; hence a vocabulary as long as Qwen3's.
"""

import json
from pathlib import Path
from typing import Any

from tests.models import MakeError, toy

DOCUMENT, QUERY = "<|embed_token|>", "<|rerank_token|>"
IDS = {DOCUMENT: 151670, QUERY: 151671}
DIMENSION = 512  # of the vectors that are compared; vLLM expects no other


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 20 MB."""
    try:
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import Qwen3Config, Qwen3Model
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    _tokenizer().save_pretrained(into)
    config = Qwen3Config(
        vocab_size=max(IDS.values()) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=toy.CONTEXT,
        initializer_range=toy.SPREAD,
        embedding_size=DIMENSION,
    )
    toy.save(Qwen3Model, config, into)
    saved = json.loads((into / "config.json").read_text()) | {"architectures": ["JinaForRanking"]}
    (into / "config.json").write_text(json.dumps(saved, indent=2))
    weights = {f"model.{name}": tensor for name, tensor in load_file(into / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(toy.SEED)
    for name, shape in (("0", (16, 32)), ("2", (DIMENSION, 16))):
        weights[f"projector.{name}.weight"] = torch.randn(*shape, generator=generator)
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})


def _tokenizer() -> Any:
    """One token a byte, and the two that the vectors are taken at."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab={"<pad>": 0} | alphabet | IDS, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([*IDS])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", model_max_length=toy.CONTEXT)  # noqa: S106  # no password
