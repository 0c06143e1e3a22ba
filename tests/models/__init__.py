"""The models of the demo and the tests, made here on demand: none is fetched from a model hub.

`smollm2`
    SmolLM2-135M-Instruct, a small but real chat model. Its weights come out of a Python package.
`scripted`
    A toy of 0.6 M parameters, trained in seconds to give the answers in `tests.models.script` to the letter.
    It is what a test needs that has to know the output beforehand: a real engine, real tokens, a real chat
    template.
`adapters`
    Two LoRA adapters for `scripted`, trained to change one of its answers.
`minilm`
    all-MiniLM-L6-v2, a small but real embedding model. Its weights come out of a Python package.
`llava`, `qwen2_audio`, `qwen2_vl`
    Toys of random weights that take images, audio clips, and images and videos; gibberish, but of its own for each.
`berts`
    Four toy BERTs of random weights in folders of their own: `cross_encoder`, `bi_encoder`, `late_interaction` and
    `token_classifier`.
`judge`
    A toy language model of random weights that ranks by the tokens "yes" and "no", as sentence-transformers saves one.
`listwise`
    A toy of random weights that ranks all documents of a request at once.
`chain`
    A toy of random weights with a large vocabulary, which says words for ever: an engine that costs next to nothing.
`whisper`
    A toy Whisper, trained to transcribe a few clips of espeak-ng to the letter, with timestamps.
`glm_asr`
    A toy of random weights that transcribes gibberish, and a LoRA adapter for it: `base`, `adapter` and `merged`.

`python -m tests.models NAME ...` makes what is missing and prints one folder a line; `ensure(NAME)` does it
in Python. Importing this package or `tests.models.script` is cheap; torch and transformers are imported only
to make a model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from tests.models import cache


class MakeError(Exception):
    """A model can't be made here; the message says what the user can do about it."""


@dataclass(frozen=True)
class Recipe:
    """How a model is made. Raise `version` with any change to what ends up in the folder."""

    module: str
    version: int


RECIPES: Mapping[str, Recipe] = {
    "smollm2": Recipe("tests.models.smollm2", 1),
    "scripted": Recipe("tests.models.scripted", 1),
    "adapters": Recipe("tests.models.adapters", 1),
    "minilm": Recipe("tests.models.minilm", 1),
    "llava": Recipe("tests.models.llava", 2),
    "qwen2_audio": Recipe("tests.models.qwen2_audio", 1),
    "qwen2_vl": Recipe("tests.models.qwen2_vl", 1),
    "berts": Recipe("tests.models.berts", 1),
    "judge": Recipe("tests.models.judge", 1),
    "listwise": Recipe("tests.models.listwise", 1),
    "chain": Recipe("tests.models.chain", 1),
    "whisper": Recipe("tests.models.whisper", 1),
    "glm_asr": Recipe("tests.models.glm_asr", 1),
}


def ensure(name: str) -> Path:
    """The folder of the model `name` (a key of `RECIPES`), made first if it is not there.

    Making takes 10 to 40 seconds on two cores and shows its progress on stderr. Another process that wants
    the same model meanwhile waits. Raises `MakeError`.
    """
    recipe = RECIPES[name]

    def make(into: Path) -> None:
        with _one_thread():
            import_module(recipe.module).make(into)

    return cache.folder(name, recipe.version, make)


@contextmanager
def _one_thread() -> Iterator[None]:
    """With two, each waits busily for the other, which waits for a core where something else runs too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
