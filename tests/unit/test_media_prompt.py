"""What is said where media and a model do not fit; no engine."""

import pytest
from vllm.exceptions import VLLMValidationError

from common.errors import BackendError, InvalidRequest, Unsupported
from common.media import Item
from common.media_prompt import named


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("tiny is not a multimodal model"), "Images: this model takes text only"),
        (ValueError("Failed to apply XProcessor on data={'text': 'secret'}"), "Images: the model's processor"),
        (ValueError("The audio (len=5) is too short"), "Images: The audio (len=5) is too short"),
        (RuntimeError("Expected there to be 1 prompt updates, found 0"), "Images: the prompt must hold"),
        (AssertionError("Failed to apply prompt replacement for mm_items['image'][0]"), "Images: the prompt must hold"),
    ],
)
def test_named(error: Exception, words: str) -> None:
    items = [Item("Images[0]", "image", "Images[0] data:;base64,secret")]
    with pytest.raises(InvalidRequest) as caught, named(items):
        raise error
    assert str(caught.value).startswith(words)
    assert "secret" not in str(caught.value)
    with pytest.raises(type(error)), named([]):
        raise error


def test_a_library_that_is_missing() -> None:
    with pytest.raises(Unsupported, match=r"^Audios: .*vLLM's extra `audio`"), named([Item("Audios[0]", "audio", "")]):
        raise ImportError("Please install vllm[audio]")
    with pytest.raises(Unsupported, match=r"^Audios: .*torchaudio"), named([Item("Audios[0]", "audio", "")]):
        raise ModuleNotFoundError("no torchaudio", name="torchaudio")


@pytest.mark.parametrize(
    "error", [RuntimeError("other"), ValueError("other"), KeyError("x"), BackendError("x"), VLLMValidationError("x")]
)
def test_not_named(error: Exception) -> None:
    with pytest.raises(type(error)), named([Item("Images[0]", "image", "")]):
        raise error
