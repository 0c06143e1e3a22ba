"""Embeddings of images, held against transformers. `test_images` runs this in a Python that has torchvision."""

import base64
import io
from functools import lru_cache
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from common.errors import InvalidRequest
from common.model import Model
from common.pb import backend_pb2 as pb
from tests.clips import picture
from tests.engine.conftest import Engines
from tests.engine.test_embedding import distance, embed, vector
from tests.models import ensure

RED, BLUE = picture("red"), picture("blue")


def b64(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.fixture
async def model(engines: Engines) -> Model:
    return await engines.get(Model=str(ensure("llava")), Embeddings=True)


@lru_cache(maxsize=1)
def reference() -> tuple[Any, Any]:
    """The processor and the model; the vision tower's names are vLLM's in the folder, and transformers' here."""
    folder = ensure("llava")
    llava = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, key_mapping={"vision_tower.vision_model.": "vision_tower."}
    )
    return AutoProcessor.from_pretrained(folder), llava.eval()


def expected(text: str, image: bytes) -> torch.Tensor:
    """The last token's hidden state."""
    processor, llava = reference()
    inputs = processor(text=f"<image>{text}", images=Image.open(io.BytesIO(image)), return_tensors="pt")
    with torch.no_grad():
        state: torch.Tensor = llava.model(**inputs).last_hidden_state[0, -1]
    return state


@pytest.mark.parametrize("text", ["", "What is this?"])
async def test_as_transformers_embeds_them(model: Model, text: str) -> None:
    red, blue = [vector(await embed(model, text, Images=[b64(image)])) for image in (RED, BLUE)]
    assert distance(red, expected(text, RED)) < 1e-4
    assert distance(blue, expected(text, BLUE)) < 1e-4
    assert distance(red, blue) > 1e-3


async def test_an_image_that_is_none(model: Model) -> None:
    with pytest.raises(InvalidRequest, match=r"^Images\[0\]: "):
        await model.embed(pb.PredictOptions(Embeddings="a", Images=[b64(b"no image")]))
