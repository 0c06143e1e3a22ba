"""A toy GLM-ASR (2 layers of hearing, 2 of text) of random weights, in `base`: gibberish, but of its own for each clip.

`adapter` is a LoRA adapter of random weights for it, by PEFT's names, and `merged` the model that it makes.
"""

import json
import shutil
from pathlib import Path

from tests.models import MakeError, toy

SOUND = "<|pad|>"
SPECIAL = ["<p>", "<s>", "</s>", SOUND, "<|begin_of_audio|>", "<|end_of_audio|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}<|{{ message.role }}|>
{{ message.content }}
{%- endfor %}<|assistant|>
"""
MEL_BINS, MERGED = 16, 4  # so many frames become one token
SECONDS = 30  # at a time, and in all
RANK, TARGET = 8, "down_proj"  # of the adapter


def make(into: Path) -> None:
    """Fill `into` with the three folders, 4 MB in all."""
    try:
        from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    base = into / "base"
    tokenizer = toy.tokenizer(SPECIAL, CHAT_TEMPLATE, __doc__ or "", {})
    tokenizer.save_pretrained(base)
    config = GlmAsrConfig(
        audio_config={
            "num_mel_bins": MEL_BINS,
            "hidden_size": 64,
            "intermediate_size": MERGED * 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": toy.SPREAD,
        },
        text_config=toy.text_fields(tokenizer),
        audio_token_id=tokenizer.convert_tokens_to_ids(SOUND),
        initializer_range=toy.SPREAD,
        tie_word_embeddings=False,
    )
    toy.save(GlmAsrForConditionalGeneration, config, base, toy.without_doubles)
    sounds = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "GlmAsrProcessor",
        "feature_size": MEL_BINS,
        "chunk_length": SECONDS,
        "return_attention_mask": True,
    }
    (base / "preprocessor_config.json").write_text(json.dumps(sounds, indent=2))
    processor = {"processor_class": "GlmAsrProcessor", "audio_token": SOUND, "max_audio_len": SECONDS}
    (base / "processor_config.json").write_text(json.dumps(processor, indent=2))
    _adapt(base, into / "adapter", into / "merged")


def _adapt(base: Path, adapter: Path, merged: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(toy.SEED)
    shutil.copytree(base, merged)
    weights = load_file(base / "model.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for name in [name for name in weights if name.endswith(f"{TARGET}.weight")]:
        rows, columns = weights[name].shape
        a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, columns), (rows, RANK)))
        a, b = a / columns**0.5, b / RANK**0.5
        module = name.removesuffix(".weight")
        parts |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        weights[name] += b @ a
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [TARGET]}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2))
