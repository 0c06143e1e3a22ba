"""A toy LLaVA (2 layers of vision, 2 of text) of random weights: gibberish, but of its own for each image."""

import json
from pathlib import Path

from tests.models import MakeError, toy

PAD, BOS, EOS, IMAGE = SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
IMAGE_SIZE, PATCH_SIZE = 28, 14
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message.role }}:
{%- if message.content is string %} {{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'image' %} <image>{% else %} {{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{% endfor %}assistant:"""


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 2 MB."""
    try:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = toy.tokenizer(SPECIAL, CHAT_TEMPLATE, __doc__ or "", {"image_token": IMAGE})
    tokenizer.save_pretrained(into)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=64,
            initializer_range=toy.SPREAD,
        ),
        text_config=LlamaConfig(**toy.text_fields(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        initializer_range=toy.SPREAD,
        tie_word_embeddings=False,
    )
    toy.save(LlavaForConditionalGeneration, config, into, _vllm_name)
    _save_processor(into)


def _vllm_name(name: str) -> str:
    # transformers 5 left this level out; vLLM still looks for it.
    if "vision_tower." in name and "vision_tower.vision_model." not in name:
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


def _save_processor(into: Path) -> None:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "do_center_crop": True,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": PATCH_SIZE,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (into / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    (into / "processor_config.json").write_text(json.dumps(processor, indent=2))
