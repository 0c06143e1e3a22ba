"""Requests with images, as `test_differential` has them without; `test_images` runs this."""

import base64
from typing import Any

import pytest

from common.media import MARKER
from common.model import Model
from common.pb import backend_pb2 as pb
from tests.clips import picture
from tests.engine.conftest import Engines
from tests.engine.test_differential import Request, chat, compare
from tests.models import ensure

RED, BLUE = (f"data:image/png;base64,{base64.b64encode(picture(colour)).decode()}" for colour in ("red", "blue"))


def seen(text: str, *images: str, **fields: Any) -> Request:
    """A question about images, in front of its text: the orchestrator's have no other place."""
    parts = [{"type": "image_url", "image_url": {"url": image}} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {**chat("x", ignore_eos=True, **fields), "messages": messages, "max_completion_tokens": 20}


REQUESTS = {
    "none": {**chat("Hello!", ignore_eos=True), "max_completion_tokens": 20},
    "one": seen("What is this?", RED),
    "two": seen("Which is red?", RED, BLUE),
    "the-same-twice": seen("Are they alike?", BLUE, BLUE),
    "sampled": seen("What is this?", BLUE, temperature=0.9, seed=3),
    "logprobs": seen("What is this?", RED, logprobs=True, top_logprobs=3),
    "in-a-conversation": {
        **seen("And this?", RED),
        "messages": [
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": "Hello."},
            *seen("And this?", RED)["messages"],
        ],
    },
}


async def llava(engines: Engines) -> Model:
    return await engines.get(Model=str(ensure("llava")), EngineArgs='{"limit_mm_per_prompt": {"image": 2}}')


@pytest.mark.parametrize("name", REQUESTS)
async def test_as_vllm_answers(engines: Engines, name: str) -> None:
    await compare(await llava(engines), REQUESTS[name])


async def test_its_marker_is_told(engines: Engines) -> None:
    assert (await (await llava(engines)).metadata(pb.ModelOptions())).media_marker == MARKER
