"""Decoded media are counted from before they are decoded until they are freed, on every way out of a request."""

import asyncio
import base64
import gc
import io
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.multimodal.media import ImageMediaIO
from vllm.multimodal.media.connector import global_thread_pool

from common import generator, media_memory, media_readers
from common.errors import InvalidRequest, Overloaded
from common.generator import Generator
from common.media import Item, media_items
from common.media_connector import Connector
from common.media_memory import Memory
from common.media_prompt import named
from common.pb import backend_pb2 as pb
from common.request import generation_request
from tests.clips import picture, sound, video

SIDE = 64
# The other has a line in the log for want of a third, which has an error that holds the sound.
SOUNDFILE = {"audio": {"audio_backend": "soundfile"}}
BYTES = SIDE * SIDE * 8


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """Enough for three pictures. Little is left to the collector: it comes when it likes."""
    counted = Memory(lambda: 6 * BYTES + 1)
    monkeypatch.setattr(media_memory, "MEMORY", counted)
    gc.disable()
    yield counted
    gc.enable()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(field: str, data: bytes, index: int = 0) -> str:
    options = pb.PredictOptions()
    getattr(options, field).extend([b64(data)] * (index + 1))
    return media_items(options)[index].url


def flat(side: int = SIDE) -> bytes:
    """What takes next to nothing until it is decoded."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "WEBP", lossless=True)
    return file.getvalue()


def test_pictures_of_all_requests(memory: Memory) -> None:
    kept = [Connector().fetch_image(url("Images", flat(), index)) for index in range(3)]
    assert memory.held == 3 * BYTES
    with pytest.raises(
        Overloaded, match=rf"^Images\[3\]: takes {BYTES} bytes when decoded; of {3 * BYTES} for all requests 0 are left"
    ):
        Connector().fetch_image(url("Images", flat(), 3))
    kept.pop()
    assert memory.held == 2 * BYTES
    kept.append(Connector().fetch_image(url("Images", flat())))
    kept.clear()
    assert memory.held == 0


@pytest.mark.parametrize("data", [flat()[:-8], picture("red")[:90], picture("red", (SIDE * 2, SIDE * 2))])
def test_pictures_that_are_refused(memory: Memory, data: bytes) -> None:
    for _ in range(4):
        with pytest.raises((InvalidRequest, Overloaded)):
            Connector().fetch_image(url("Images", data))
        assert memory.held == 0


def test_videos(memory: Memory) -> None:
    frames = 2 * BYTES // (32 * 32 * 3)
    decoded = Connector().fetch_video(url("Videos", video(range(frames))))
    assert memory.held == decoded[0].nbytes > BYTES
    # Whoever takes the array alone has its memory, too.
    array = decoded[0][2:][:1]
    del decoded
    assert memory.held > BYTES
    with pytest.raises(Overloaded, match=r"^Videos\[0\]: takes "):
        Connector({"video": {"num_frames": 64}}).fetch_video(url("Videos", video(range(64))))
    del array
    assert memory.held == 0
    with pytest.raises(InvalidRequest):
        Connector().fetch_video(url("Videos", video(range(20))[:3000]))
    assert memory.held == 0


def test_sounds(memory: Memory) -> None:
    pytest.importorskip("soundfile", reason="vLLM's extra `audio` is not installed")
    samples, _ = Connector(SOUNDFILE).fetch_audio(url("Audios", sound(0.1)))
    assert memory.held == samples.nbytes > 0
    del samples
    assert memory.held == 0
    with pytest.raises(Overloaded, match=r"^Audios\[0\]: takes "):
        Connector(SOUNDFILE).fetch_audio(url("Audios", sound(20)))
    assert memory.held == 0


async def test_all_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2 * BYTES
    monkeypatch.setattr(media_readers, "_request_limit", lambda: most)
    said = rf"^Images\[2\]: takes the decoded media of this request to {3 * BYTES} bytes; {most} are allowed"
    with named([Item("Images[0]", "image", "")]):
        for index in range(2):
            await Connector().fetch_image_async(url("Images", flat(), index))
        with pytest.raises(InvalidRequest, match=said):
            await Connector().fetch_image_async(url("Images", flat(), 2))
    for index in range(3):  # each of a request of its own
        with named([Item("Images[0]", "image", "")]):
            await Connector().fetch_image_async(url("Images", flat(), index))


def test_the_limit_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert media_readers._request_limit() == 3 * 2**30
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", "0")
    assert media_readers._request_limit() == 0


def until_free(memory: Memory) -> bool:
    end = time.monotonic() + 30
    while memory.held and time.monotonic() < end:
        time.sleep(0.01)
    return not memory.held


async def let_go() -> None:
    """Return when no thread holds what it has just returned, as one does that waits for its turn to go on."""
    threads = global_thread_pool._max_workers
    all_here = threading.Barrier(threads)
    loop = asyncio.get_running_loop()
    await asyncio.gather(*(loop.run_in_executor(global_thread_pool, all_here.wait, 30) for _ in range(threads)))


async def rendered(urls: list[str]) -> Any:
    """As vLLM does it."""
    results = await asyncio.gather(*(Connector().fetch_image_async(each) for each in urls), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return sum(np.asarray(result.media).size for result in results if not isinstance(result, BaseException))


async def test_a_request_that_fails_holds_nothing_from_others(memory: Memory) -> None:
    for _ in range(9):
        with pytest.raises(InvalidRequest, match=r"^Images\[1\]: can't"), named([Item("Images[0]", "image", "")]):
            await rendered([url("Images", flat()), url("Images", picture("red")[:90], 1)])
        memory._collected = -1e9  # it may be asked to collect again
        await let_go()
    assert await rendered([url("Images", flat())])


async def test_a_request_that_is_cancelled(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    load = ImageMediaIO.load_bytes

    def slow(self: Any, data: bytes) -> Any:
        begun.set()
        may_end.wait(30)
        return load(self, data)

    monkeypatch.setattr(ImageMediaIO, "load_bytes", slow)
    task = asyncio.create_task(rendered([url("Images", flat())]))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # It is still being decoded.
    assert memory.held == BYTES
    may_end.set()
    assert await asyncio.to_thread(until_free, memory)


def test_threads(memory: Memory) -> None:
    def work() -> None:
        for _ in range(300):
            try:
                memory.take("Images[0]", BYTES, 0)
            except Overloaded:
                continue
            memory.hold(np.zeros(1), BYTES)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.held == 0


async def test_a_raw_prompt_holds_its_media_only_until_it_is_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request lives as long as its answer."""

    async def raw_prompt(text: str, _items: Any, _renderer: Any) -> Any:
        return {"prompt": text, "multi_modal_data": {"image": [object()]}}

    async def render_completion(openai: Any) -> Any:
        assert openai.prompt["multi_modal_data"]
        return [{"type": "token", "prompt_token_ids": [1]}]

    monkeypatch.setattr(generator, "raw_prompt", raw_prompt)
    made: Any = Generator.__new__(Generator)
    made.renderer = SimpleNamespace(render_completion=render_completion)
    made.llm = SimpleNamespace(renderer=None)
    made.model_config = SimpleNamespace(max_model_len=9, is_encoder_decoder=False)
    options = pb.PredictOptions(Prompt="hi", Images=[b64(picture("red"))])
    request = generation_request(options, stream=False, has_tool_parser=False)
    assert await made.render(request)
    assert request.openai.prompt == "hi"
