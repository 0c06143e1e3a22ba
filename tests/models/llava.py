"""A toy LLaVA (2 layers of vision, 2 of text) of random weights: gibberish, but of its own for each image.

vLLM looks into a model class with pictures only where torchvision can be imported. On a machine whose torch came as a
wheel of its own, torchvision's builds do not fit it: their compiled part does not load. `python_path` gives what makes
that do for a test, a folder for PYTHONPATH.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.models import MakeError, cache

TORCHVISION = "torchvision==0.28.0"
PAD, BOS, EOS, IMAGE = SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
VOCABULARY = 512
SEED = 7
SPREAD = 0.5  # of the random weights: wide enough that the answers hang on each token
IMAGE_SIZE, PATCH_SIZE = 28, 14
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message.role }}:
{%- if message.content is string %} {{ message.content }}{% else %}
{%- for part in message.content %}{% if part.type == 'image' %} <image>{% else %} {{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{% endfor %}assistant:"""
# The two operators that torchvision's compiled part would define; Python code of torchvision names them on import.
SITECUSTOMIZE = '''\
"""Made by tests/models/llava.py: lets torchvision be imported without its compiled part."""

import sys


class _BeforeTorchvision:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(
                    "torchvision::" + operator, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, _BeforeTorchvision())
'''

Tokenizer = Any  # transformers' classes are untyped


def python_path() -> str:
    """What a server's PYTHONPATH needs so that it can load the model; "" where torchvision is installed anyway.

    Installed into the folder of the models on first use, from the package index. Raises `MakeError`.
    """
    if importlib.util.find_spec("torchvision"):
        return ""
    return str(cache.folder("torchvision", 1, _install_torchvision))


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 2 MB."""
    try:
        import torch
        from safetensors.torch import save_file
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = _tokenizer()
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
            initializer_range=SPREAD,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            initializer_range=SPREAD,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        initializer_range=SPREAD,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlavaForConditionalGeneration(config).float()
    model.save_pretrained(into)
    weights = {_vllm_name(name): tensor for name, tensor in _load(into / "model.safetensors").items()}
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    _save_processor(into)


def _load(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights: dict[str, Any] = load_file(file)
    return weights


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


def _tokenizer() -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([CHAT_TEMPLATE, __doc__ or ""], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _install_torchvision(into: Path) -> None:
    uv = os.environ.get("UV") or shutil.which("uv") or str(cache.REPOSITORY / ".uv/bin/uv")
    installer = (
        [uv, "pip", "install", "--python", sys.executable] if Path(uv).exists() else ["python3", "-m", "pip", "install"]
    )
    done = subprocess.run(
        [*installer, "--quiet", "--no-deps", "--target", into, TORCHVISION], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise MakeError(f"{TORCHVISION} can't be installed: {last}")
    (into / "sitecustomize.py").write_text(SITECUSTOMIZE)
