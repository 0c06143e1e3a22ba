"""Media and a model: the prompt that has both, and what is said where they don't fit.

No text raised here holds anything of a prompt.
"""

import asyncio
import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from vllm.exceptions import VLLMValidationError
from vllm.model_executor.model_loader import get_model_cls
from vllm.transformers_utils.processor import get_video_processor_cls_name

from common.concurrency import in_thread
from common.errors import BackendError, InvalidRequest, Unsupported
from common.media import MODALITIES, Item, fields_of, place_in_prompt
from common.media_connector import Connector
from common.media_memory import one_request

TEXT_ONLY = "this model takes text only"
# In order of preference: vLLM's names of methods -> the module of each.
_RESAMPLERS = {"soxr": "soxr", "pyav": "av"}


async def raw_prompt(text: str, items: Sequence[Item], renderer: Any) -> Any:
    """What vLLM takes for a prompt with media: the model's own placeholders in it, and the media fetched and decoded.

    Raises:
        InvalidRequest: the model takes no such media, or not so many, or an item can't be fetched or decoded.

    """
    with named(items):
        info = renderer.get_mm_processor().info if renderer.mm_processor else None
        if info is None:
            raise InvalidRequest(fields_of(items), TEXT_ONLY)
        for modality in MODALITIES.values():
            if count := sum(item.modality == modality for item in items):
                info.validate_num_items(modality, count)
        # In a thread: a prompt may have a million markers.
        text, items = await in_thread(place_in_prompt, text, items, *_placeholders(renderer, items))
        config = renderer.model_config
        connector = Connector(
            config.multimodal_config.media_io_kwargs,
            allowed_local_media_path=config.allowed_local_media_path,
            allowed_media_domains=config.allowed_media_domains,
        )
        fetch = {
            "image": connector.fetch_image_async,
            "video": functools.partial(
                connector.fetch_video_async, video_processor=get_video_processor_cls_name(config)
            ),
            "audio": connector.fetch_audio_async,
        }
        data: dict[str, list[Any]] = {}
        for item, decoded in zip(
            items, await asyncio.gather(*(fetch[item.modality](item.url) for item in items)), strict=True
        ):
            data.setdefault(item.modality, []).append(decoded)
        return {"prompt": text, "multi_modal_data": data}


@contextlib.contextmanager
def named(items: Sequence[Item]) -> Iterator[None]:
    """Raise InvalidRequest or Unsupported where vLLM's renderer can't take `items`; its words may repeat the prompt.

    All `items` are of one request, whose decoded media may take only so much memory together.
    """
    try:
        with one_request():
            yield
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        text = str(error)
        if not items or isinstance(error, BackendError | VLLMValidationError):
            raise
        if isinstance(error, ImportError):
            lacks = error.name or "vLLM's extra `audio`"
            raise Unsupported(f"{fields_of(items)}: this installation can't prepare it; it needs {lacks}") from None
        if text.startswith("The audio "):
            reason = text
        elif text.endswith("is not a multimodal model"):
            reason = TEXT_ONLY
        elif text.startswith("Expected there to be ") or "prompt replacement" in text:
            reason = "the prompt must hold the model's own placeholder once for each of them"
        elif text.startswith("Failed to apply "):
            reason = "the model's processor can't take them; are they too small, or too long and thin?"
        else:
            raise
        raise InvalidRequest(fields_of(items), reason) from None


def choose_resampler(renderer: Any) -> None:
    """Have clips resampled by a library that takes any sample rate, where one is installed.

    vLLM's own choice, torchaudio, does not come with every torch, and its kernel for a rate that shares no factor with
    the model's takes gigabytes: a clip of 44101 Hz took 23.
    """
    processor = renderer.mm_processor
    method = next((name for name, module in _RESAMPLERS.items() if importlib.util.find_spec(module)), None)
    if processor is not None and method:
        for parser in (processor.data_parser, processor.info.data_parser):
            parser.audio_resampler.method = method


def _placeholders(renderer: Any, items: Sequence[Item]) -> tuple[dict[str, str], Callable[[str, int], str | None]]:
    """The placeholders of the model for the modalities of `items`, as `place_in_prompt` takes them."""
    model_class = get_model_cls(renderer.model_config)
    processor = renderer.get_mm_processor()
    hf_processor = processor.info.get_hf_processor()

    def placeholder(modality: str, number: int) -> str | None:
        try:
            return cast("str | None", model_class.get_placeholder_str(modality, number))
        except ValueError:  # for a modality that only its processor knows
            return None

    own: dict[str, str] = {}
    for modality in {item.modality for item in items}:
        count = sum(item.modality == modality for item in items)
        texts = [placeholder(modality, number) for number in range(1, count + 1)]
        # Prompts may have it without what a chat puts around it.
        texts += [
            processor.dummy_inputs.get_dummy_text({modality: 1}),
            getattr(hf_processor, f"{modality}_token", None),
        ]
        own |= {text: modality for text in texts if isinstance(text, str) and text.strip()}
    return own, placeholder
