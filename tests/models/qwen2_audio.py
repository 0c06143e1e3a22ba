"""A toy Qwen2-Audio (2 layers of hearing, 2 of text) of random weights: gibberish, but of its own for each clip.

A clip becomes 25 tokens a second, of 30 seconds at most.
"""

import json
from pathlib import Path

from tests.models import MakeError, toy

SPECIAL = ["<pad>", "<s>", "</s>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
RATE, SECONDS, MEL_BINS = 16_000, 30, 16
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message.role }}:
{%- if message.content is string %} {{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'audio' %} <|audio_bos|><|AUDIO|><|audio_eos|>
{%- else %} {{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{% endfor %}assistant:"""


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 2 MB."""
    try:
        from transformers import (
            Qwen2AudioConfig,
            Qwen2AudioEncoderConfig,
            Qwen2AudioForConditionalGeneration,
            Qwen2Config,
        )
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = toy.tokenizer(SPECIAL, CHAT_TEMPLATE, __doc__ or "", {"audio_token": "<|AUDIO|>"})
    tokenizer.save_pretrained(into)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(
            num_mel_bins=MEL_BINS,
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=128,
            initializer_range=toy.SPREAD,
        ),
        text_config=Qwen2Config(**toy.text_fields(tokenizer)),
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        initializer_range=toy.SPREAD,
        tie_word_embeddings=False,
    )
    toy.save(Qwen2AudioForConditionalGeneration, config, into, toy.without_doubles)
    sounds = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2AudioProcessor",
        "feature_size": MEL_BINS,
        "sampling_rate": RATE,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": SECONDS,
        "return_attention_mask": True,
    }
    (into / "preprocessor_config.json").write_text(json.dumps(sounds, indent=2))
    (into / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2AudioProcessor"}, indent=2))
