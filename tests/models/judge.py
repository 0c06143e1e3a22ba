"""A toy Llama of random weights that ranks: whether it would go on with "yes" or with "no".

Its folder says so in the files that sentence-transformers writes for a `CrossEncoder` of a language model.
"""

import json
from pathlib import Path
from typing import Any

from tests.models import MakeError, toy

NO, YES = "no", "yes"
SPECIAL = ["<pad>", "<s>", "</s>", NO, YES]
CHAT_TEMPLATE = """\
Query: {{ (messages | selectattr("role", "equalto", "query") | first).content }}
Document: {{ (messages | selectattr("role", "equalto", "document") | first).content }}
{% if add_generation_prompt %}Does the document answer the query? {% endif %}"""


def make(into: Path) -> None:
    """Fill `into` with the model: float32 safetensors, 2 MB."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise MakeError(f"{error}. It needs torch and transformers, which come with vLLM.") from error
    tokenizer = toy.tokenizer(SPECIAL, CHAT_TEMPLATE, __doc__ or "", {})
    tokenizer.save_pretrained(into)
    toy.save(LlamaForCausalLM, LlamaConfig(**toy.text_fields(tokenizer), tie_word_embeddings=False), into)
    transformer = {
        "transformer_task": "text-generation",
        "module_output_name": "causal_logits",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }
    package = "sentence_transformers"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{package}.base.modules.transformer.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Score", "type": f"{package}.cross_encoder.modules.logit_score.LogitScore"},
    ]
    head = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in (("true", YES), ("false", NO))
    }
    settings = {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.linear.Identity"}
    (into / "1_Score").mkdir()
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Score/config.json": head,
        "sentence_bert_config.json": transformer,
        f"config_{package}.json": settings,
    }
    for name, content in files.items():
        (into / name).write_text(json.dumps(content, indent=2))
