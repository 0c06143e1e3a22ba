"""Two hundred sentences of many lengths, and what transformers makes of them with all-MiniLM-L6-v2's weights."""

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from tests.models import ensure

_WHO = (
    "The old captain",
    "A tired engineer",
    "My neighbour's cat",
    "Nobody in Ghent",
    "She",
    "The committee of nine",
    "Everyone else",
)
_DOES = ("buys", "forgot to water", "wrote 1,024 letters about", "can't stand", "would have painted", "sings to")
_WHAT = (
    "the tomatoes.",
    "a blue bicycle with three wheels, which nobody had asked for!",
    "quantum chromodynamics (again).",
    "the river, the road, the hill behind it, and everything that one can see from up there on a clear day in June.",
    "it?",
)
_OTHER = (
    "a",
    "Ünïcödé çàfé, naïve façade: déjà vu.",
    "Die Katze sitzt auf der Matte und schläft.",
    "Кошка сидит на коврике.",
    "猫がマットの上に座っている。",
    "고양이가 매트 위에 앉아 있다",
    "القطة تجلس على السجادة",
    "\U0001f408 on \U0001f9f6, \U0001f468\u200d\U0001f469\u200d\U0001f467 at home",
    "def f(x): return {x: [x] * 3}  # as one does",
    "   spaces   all \t over\nthe   place   ",
    "[CLS] a special token [SEP] in the text [MASK]",
    "word " * 120,
)
SENTENCES: tuple[str, ...] = (
    *_OTHER,
    *(" ".join(parts) for parts in itertools.islice(itertools.product(_WHO, _DOES, _WHAT), 200 - len(_OTHER))),
)


@lru_cache(maxsize=1)
def loaded() -> tuple[Any, Any]:
    """The tokenizer and the model, in float32."""
    folder = ensure("minilm")
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def hidden(text: str) -> torch.Tensor:
    """The last hidden state, `[tokens, 384]`."""
    tokenizer, model = loaded()
    with torch.no_grad():
        state: torch.Tensor = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return state


def embedded(texts: Sequence[str]) -> torch.Tensor:
    """The mean over the tokens of each text, of length 1: `[texts, 384]`."""
    return torch.nn.functional.normalize(torch.stack([hidden(text).mean(dim=0) for text in texts]), dim=-1)
