"""A toy Qwen2-VL (2 layers of vision, 2 of text) of random weights: gibberish, but of its own for each video.

Of a video it takes two frames a second, four at least; every two of them become 1 to 4 tokens.
"""

import json
from pathlib import Path

from tests.models import MakeError, toy

IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
SPECIAL = ["<pad>", "<s>", "</s>", IMAGE, VIDEO, START, END]
PATCH_SIZE, MERGE = 14, 2
# Of one frame: 1 or 4 tokens.
PIXELS = {"shortest_edge": (PATCH_SIZE * MERGE) ** 2, "longest_edge": (PATCH_SIZE * MERGE * 2) ** 2}
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message.role }}:
{%- if message.content is string %} {{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %} <|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %} <|vision_start|><|video_pad|><|vision_end|>
{%- else %} {{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{% endfor %}assistant:"""


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 3 MB."""
    try:
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = toy.tokenizer(SPECIAL, CHAT_TEMPLATE, __doc__ or "", {"image_token": IMAGE, "video_token": VIDEO})
    tokenizer.save_pretrained(into)
    token_ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(("image", "video", "vision_start", "vision_end"), SPECIAL[3:], strict=True)
    }
    text = toy.text_fields(tokenizer)
    text.pop("head_dim")
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": text["hidden_size"],
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE,
            "initializer_range": toy.SPREAD,
        },
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        initializer_range=toy.SPREAD,
        tie_word_embeddings=False,
        **token_ids,
    )
    toy.save(Qwen2VLForConditionalGeneration, config, into)
    pictures = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": PIXELS,
        "patch_size": PATCH_SIZE,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    videos = {**pictures, "video_processor_type": "Qwen2VLVideoProcessor"}
    del videos["image_processor_type"]
    (into / "preprocessor_config.json").write_text(json.dumps(pictures, indent=2))
    (into / "video_preprocessor_config.json").write_text(json.dumps(videos, indent=2))
