"""Audio clips through a real engine: the model hears them, and what is no sound harms nobody."""

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clips import sound
from tests.models import ensure, torchvision
from tests.process.media import SECRET, answer, b64, chat, prompt_tokens, raw, refused, said
from tests.process.orchestrator import Backend
from tests.process.wire import check_shape, content, model_options

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("soundfile") is None, reason="vLLM's extra `audio` is not installed"
)

TONE, OTHER = b64(sound(1)), b64(sound(1, hertz=880))
# Where a WAV says how it is, and how much it has.
RATE_AT, CHANNELS_AT, SIZE_AT = 24, 22, 40


def heard(*clips: str, text: str = "What is this?", **fields: Any) -> Any:
    return chat(text, Audios=clips, **fields)


def lying(offset: int, value: int, size: int = 4, seconds: float = 1) -> str:
    """A WAV with something else in its header."""
    wav = bytearray(sound(seconds))
    wav[offset : offset + size] = value.to_bytes(size, "little")
    return b64(bytes(wav))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose files a request may name."""
    folder = tmp_path_factory.mktemp("allowed clips")
    (folder / "tone.wav").write_bytes(sound(1))
    (folder / "empty.wav").write_bytes(b"")
    (folder.parent / "outside.wav").write_bytes(sound(1))
    return folder


@pytest.fixture(scope="module")
def hearing(folder: Path) -> Iterator[Backend]:
    """A server with the toy Qwen2-Audio in it, which takes two clips."""
    with Backend(env={"PYTHONPATH": torchvision.python_path()}) as backend:
        backend.wait_for_health()
        result = backend.load(
            model_options(
                ensure("qwen2_audio"), f"--allowed-local-media-path:{folder}", DType="float32", LimitAudioPerPrompt=2
            )
        )
        assert result.success, result.message
        yield backend
        assert SECRET not in backend.stderr
        assert TONE[:200] not in backend.stderr


def test_it_hears(hearing: Backend) -> None:
    tone = said(hearing, heard(TONE))
    assert said(hearing, heard(OTHER)) != tone
    assert said(hearing, heard(TONE)) == tone
    assert said(hearing, heard()) != tone


def test_streamed_is_whole(hearing: Backend) -> None:
    replies = hearing.stream(heard(TONE))
    check_shape(replies)
    whole = answer(hearing, heard(TONE))
    assert content(replies) == whole.message.decode()
    assert replies[-1].prompt_tokens == whole.prompt_tokens


def test_tokens_by_length(hearing: Backend) -> None:
    # 25 a second, beside the two around it, and thirty seconds at most.
    text = prompt_tokens(hearing, heard())
    tokens = {seconds: prompt_tokens(hearing, heard(b64(sound(seconds)))) - text for seconds in (0.5, 1, 2, 5, 30, 40)}
    assert tokens[1] - tokens[0.5] in (12, 13)
    assert tokens[2] - tokens[1] == 25
    assert tokens[5] - tokens[2] == 75
    assert tokens[30] - tokens[5] == 625
    assert tokens[40] == tokens[30]
    assert prompt_tokens(hearing, heard(TONE, TONE)) - text == 2 * tokens[1]
    assert hearing.call("TokenizeString", heard(TONE)).length == text + tokens[1]


def test_forms_of_one_clip(hearing: Backend, folder: Path) -> None:
    tone = said(hearing, heard(TONE))
    for form in (
        f"data:audio/wav;base64,{TONE}",
        f"data:application/octet-stream;base64,{TONE}",
        TONE[:100] + "\r\n" + TONE[100:],
        str(folder / "tone.wav"),
    ):
        assert said(hearing, heard(form)) == tone


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000, 44_101, 192_001])
def test_any_sample_rate(hearing: Backend, rate: int) -> None:
    # As many tokens, give or take the last one of a clip that is a sample longer or shorter.
    expected = prompt_tokens(hearing, heard(TONE))
    assert abs(prompt_tokens(hearing, heard(b64(sound(1, rate=rate)))) - expected) <= 1


def test_order_and_place(hearing: Backend) -> None:
    assert said(hearing, heard(TONE, OTHER)) != said(hearing, heard(OTHER, TONE))
    first, middle = heard(TONE, text="<__media__>one two"), heard(TONE, text="one<__media__> two")
    assert said(hearing, first) == said(hearing, heard(TONE, text="one two"))
    assert said(hearing, first) != said(hearing, middle)


def test_raw_prompt(hearing: Backend) -> None:
    clip = "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>"
    own = said(hearing, raw(f"user: {clip} What?", Audios=[TONE]))
    assert said(hearing, raw("user: <__media__> What?", Audios=[TONE])) == own
    assert said(hearing, raw("user: <__media__> What?", Audios=[OTHER])) != own
    assert said(hearing, raw("What?", Audios=[TONE])) == said(hearing, raw(f"{clip}What?", Audios=[TONE]))
    two = f"{clip}{clip.replace('1', '2')}What?"
    assert said(hearing, raw("<__media__><__media__>What?", Audios=[TONE, OTHER])) == said(
        hearing, raw(two, Audios=[TONE, OTHER])
    )
    # Without what a chat puts around it.
    bare = raw("<|AUDIO|>What?", Audios=[TONE])
    assert hearing.call("TokenizeString", bare).length == prompt_tokens(hearing, bare)
    assert prompt_tokens(hearing, bare) < prompt_tokens(hearing, raw("What?", Audios=[TONE]))


@pytest.mark.parametrize(
    ("clip", "words"),
    [
        ("", "Audios[1]: is empty"),
        ("data:audio/wav;base64,", "Audios[1]: is empty"),
        ("data:audio/wav,abc", "Audios[1]: is a data: URI without"),
        ("not base64 at all!", "Audios[1]: is not valid base64"),
        (SECRET, "Audios[1]: can't be decoded"),
        (b64(b"ID3" + b"secret" * 40), "Audios[1]: can't be decoded"),
        (b64(b"OggS" + b"secret" * 40), "Audios[1]: can't be decoded"),
        (b64(b"\x89PNG\r\n\x1a\n" + b"secret" * 40), "Audios[1]: holds image/png"),
        (b64(sound(1)[:20]), "Audios[1]: can't be decoded"),
        (b64(sound(1)[:44]), "Audios[1]: holds no sound"),
        (b64(sound(0)), "Audios[1]: holds no sound"),
        (b64(sound(1 / 16_000)), "Audios: The audio (len=1) is too short"),
        (lying(RATE_AT, 1), "Audios[1]: Audio exceeds maximum allowed duration of 600s"),
        (lying(RATE_AT, 0), "Audios[1]: can't be decoded"),
        (lying(RATE_AT, 2**32 - 1), "Audios[1]: can't be decoded"),
        (lying(CHANNELS_AT, 65_535, size=2), "Audios[1]: can't be decoded"),
        (b64(sound(1)[:SIZE_AT] + struct.pack("<I", 700 * 32_000) + bytes(700 * 32_000)), "Audios[1]: Audio exceeds"),
        (b64(sound(1) + bytes(26 * 2**20)), "Audios[1]: Maximum file size exceeded"),
        ("/etc/passwd", "Audios[1]: is a path outside"),
        ("{}/../outside.wav", "Audios[1]: is a path outside"),
        ("{}/none.wav", "Audios[1]: is the path of no regular file"),
        ("{}/empty.wav", "Audios[1]: can't be decoded"),
        ("https://example.com/a.wav?token=" + SECRET, "Audios[1]: is a URL"),
    ],
    ids=lambda value: value[:40],
)
@pytest.mark.parametrize("form", [heard, lambda *clips: raw("What?", Audios=clips)], ids=["chat", "raw"])
def test_bad_clip(hearing: Backend, folder: Path, clip: str, words: str, form: Any) -> None:
    clip = clip.replace("{}", str(folder))
    details = refused(hearing, form(TONE, clip))
    assert details.startswith(words), details
    assert said(hearing, heard(TONE))


def test_a_header_that_promises_gigabytes(hearing: Backend) -> None:
    # What is there counts.
    for size in (2**31 - 1, 2**32 - 1, 2**32 - 16):
        assert said(hearing, heard(lying(SIZE_AT, size))) == said(hearing, heard(TONE))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (heard(TONE, TONE, TONE), "Audios: At most 2 audio(s)"),
        (raw("What?", Audios=[TONE] * 3), "Audios: At most 2 audio(s)"),
        (heard(Images=[b64(b"\x89PNG\r\n\x1a\n")]), "Images: At most 0 image(s)"),
        (raw("<|AUDIO|>", Audios=[TONE, TONE]), "Audios: the prompt must hold"),
    ],
    ids=["chat", "raw", "image", "placeholders"],
)
def test_clips_that_do_not_fit(hearing: Backend, request_: Any, words: str) -> None:
    assert refused(hearing, request_).startswith(words)
    assert said(hearing, heard(TONE))


def test_many_at_once(hearing: Backend) -> None:
    tone = said(hearing, heard(TONE))
    with hearing.connection() as stub:
        good = [stub.Predict.future(heard(TONE), timeout=60) for _ in range(8)]
        bad = [stub.Predict.future(heard(SECRET), timeout=60) for _ in range(8)]
        assert [future.result().message.decode() for future in good] == [tone] * 8
        assert {str(future.code()) for future in bad} == {"StatusCode.INVALID_ARGUMENT"}
