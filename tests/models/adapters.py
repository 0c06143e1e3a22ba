"""Two LoRA adapters for the scripted model, each with another answer to one of its questions.

`lyon/` is of rank 8 on all linear layers, `berlin/` of rank 4 on those of the attention. PEFT's own file names and
configuration; nothing but what vLLM reads.
"""

import json
from pathlib import Path

from tests.models import MakeError, ensure
from tests.models.script import line
from tests.models.scripted import EOS

QUESTION = line("plain")
ANSWERS = {"lyon": "The capital of France is Lyon, they say.", "berlin": "It is Berlin."}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"lyon": (8, (*ATTENTION, "gate_proj", "up_proj", "down_proj")), "berlin": (4, ATTENTION)}


def make(into: Path) -> None:
    """Fill `into` with the adapters' folders, 200 KB in all."""
    from safetensors.torch import save_file

    from tests.models import training

    base = ensure("scripted")
    for name, answer in ANSWERS.items():
        rank, targets = TARGETS[name]
        folder = into / name
        folder.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": list(targets),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        prompt = training.prompt_of(base, QUESTION.messages)
        weights = training.adapt(base, prompt, answer + EOS, rank=rank, alpha=2 * rank, targets=targets)
        save_file(weights, folder / "adapter_model.safetensors")
        said = training.generate(base, prompt, adapter=folder)
        if said != answer + EOS:
            raise MakeError(f"with {name} it should say {answer + EOS!r} and says {said!r}")
