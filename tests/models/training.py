"""How the scripted model learns its lines, and how it is heard saying them."""

import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.models import MakeError

Model = Any  # transformers' classes are untyped
Lesson = tuple[list[int], list[int]]  # token ids of a prompt and of its answer, EOS included

CONTEXT = 4096
SEED = 20
STEPS = 400  # about 100 are needed
LEARNING_RATE = 3e-3
INITIAL_SPREAD = 0.06  # three times the usual: a small model learns by heart in half the steps
WORST_LOSS = 0.02  # of any single token; 0.02 is a lead of about 4 in the logits
BATCH_TOKENS = 1024
IGNORED = -100


def train(lessons: Sequence[Lesson], *, vocabulary: int, eos: int, pad: int) -> Model:
    """A model that knows `lessons` by heart; the same one each time on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(_config(vocabulary, eos, pad))
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    batches = _batches(lessons, pad)
    answer_tokens = sum(len(answer) for _, answer in lessons)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    with tqdm(total=STEPS, desc="scripted", unit="step", file=sys.stderr) as steps:
        for _ in range(STEPS):
            mean = worst = 0.0
            for ids, targets in batches:
                losses = _losses(model, ids, targets)
                (losses.sum() / answer_tokens).backward()
                mean += losses.sum().item() / answer_tokens
                worst = max(worst, losses.max().item())
            if worst < WORST_LOSS:
                steps.total = steps.n
                model.zero_grad()
                return _sharpened(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps.update()
            steps.set_postfix_str(f"loss {mean:.4f}, of the worst token {worst:.3f}")
    raise MakeError(f"after {STEPS} steps the worst token still has a loss of {worst:.3f}")


def adapt(
    folder: Path, prompt: str, answer: str, *, rank: int, alpha: float, targets: Sequence[str]
) -> dict[str, torch.Tensor]:
    """LoRA weights, by PEFT's names, with which the model in `folder` says `answer` to `prompt`."""
    tokenizer, model = loaded(folder)
    prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(answer)
    ids = torch.tensor([prompt_ids + answer_ids])
    layers = {name: layer for name, layer in model.named_modules() if name.rpartition(".")[2] in targets}
    weights: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for name, layer in layers.items():
            weights[f"{name}.lora_A"] = torch.nn.Parameter(torch.randn(rank, layer.in_features) / rank)
            weights[f"{name}.lora_B"] = torch.nn.Parameter(torch.zeros(layer.out_features, rank))
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=0.0)
    for _ in range(STEPS):
        adapted = {
            f"{name}.weight": layer.weight.detach()
            + alpha / rank * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"]
            for name, layer in layers.items()
        }
        logits = functional_call(model, adapted, (ids,)).logits[0, len(prompt_ids) - 1 : -1]
        losses = cross_entropy(logits, torch.tensor(answer_ids), reduction="none")
        if losses.max().item() < WORST_LOSS:
            prefix = "base_model.model."
            return {f"{prefix}{name}.weight": weight.detach().contiguous() for name, weight in weights.items()}
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    raise MakeError(f"after {STEPS} steps the worst token of the adapter still has a loss of {losses.max():.3f}")


def prompt_of(folder: Path, messages: Sequence[Any]) -> str:
    """A chat as the template of the model in `folder` writes it."""
    tokenizer, _ = loaded(folder)
    prompt: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return prompt


def generate(folder: Path, prompt: str, *, adapter: Path | None = None, scale: float = 1.0) -> str:
    """What the model in `folder` says to `prompt` by greedy decoding in float32, markers and EOS included."""
    tokenizer, model = loaded(folder, adapter, scale)
    ids = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=1024, do_sample=False)
    text: str = tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=False)
    return text


def next_logprobs(folder: Path, prompt: str, *, adapter: Path | None = None, scale: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the token after `prompt`, by token id."""
    tokenizer, model = loaded(folder, adapter, scale)
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    return torch.log_softmax(logits, dim=-1)


@lru_cache(maxsize=4)
def loaded(folder: Path, adapter: Path | None = None, scale: float = 1.0) -> tuple[Any, Model]:
    """The tokenizer, and the model with an adapter merged into its weights."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        weights = load_file(adapter / "adapter_model.safetensors")
        for name, layer in model.named_modules():
            prefix = f"base_model.model.{name}"
            if f"{prefix}.lora_A.weight" in weights:
                delta = weights[f"{prefix}.lora_B.weight"] @ weights[f"{prefix}.lora_A.weight"]
                layer.weight.data += scale * config["lora_alpha"] / config["r"] * delta
    return AutoTokenizer.from_pretrained(folder), model.eval()


def _config(vocabulary: int, eos: int, pad: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        initializer_range=INITIAL_SPREAD,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _batches(lessons: Sequence[Lesson], pad: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All lessons, short ones together, as (input ids, target ids); only tokens of answers are targets."""
    groups: list[list[Lesson]] = []
    for lesson in sorted(lessons, key=_length):
        if not groups or (len(groups[-1]) + 1) * _length(lesson) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(lesson)
    batches = []
    for group in groups:
        ids = torch.full((len(group), _length(group[-1])), pad)
        targets = torch.full_like(ids, IGNORED)
        for row, (prompt, answer) in enumerate(group):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            targets[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        batches.append((ids[:, :-1], targets[:, 1:]))
    return batches


def _length(lesson: Lesson) -> int:
    prompt, answer = lesson
    return len(prompt) + len(answer)


def _sharpened(model: Model) -> Model:
    """Double the logits, as slow further training would do: now sampling keeps to the script, too."""
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    return model.eval()


def _losses(model: Model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each target. Padding on the right needs no mask: causal attention does not look there."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    wanted = targets != IGNORED
    return cross_entropy(model.lm_head(hidden[wanted]), targets[wanted], reduction="none")
