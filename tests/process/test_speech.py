"""An audio file through the server as the orchestrator would have it transcribed."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from common.pb import backend_pb2 as pb
from tests.models import ensure, whisper
from tests.models.whisper import LESSONS, SECONDS
from tests.process.orchestrator import Backend
from tests.process.wire import model_options

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("soundfile") is None, reason="vLLM's extra `audio` is not installed"
)

SECOND = 1_000_000_000
# What the orchestrator adds to every model of vLLM's, and what it uploads.
IMPOSED = '{"enable_prefix_caching": true, "enable_chunked_prefill": true}'
SECRET = b"a private letter. "


@pytest.fixture(scope="module")
def hearing() -> Iterator[Backend]:
    """A server with the toy Whisper in it."""
    with Backend() as backend:
        backend.wait_for_health()
        result = backend.load(model_options(ensure("whisper"), EngineArgs=IMPOSED, DType="float32"))
        assert result.success, result.message
        yield backend
        for lesson in LESSONS:
            for _, phrase, _ in lesson.phrases:
                assert phrase not in backend.stderr
        assert SECRET.decode() not in backend.stderr


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    """As the orchestrator lays it down for one call."""
    return Path(shutil.copy(whisper.clip(ensure("whisper"), "kettle"), tmp_path / "upload.wav"))


def streamed(backend: Backend, request: pb.TranscriptRequest) -> list[pb.TranscriptStreamResponse]:
    with backend.connection() as stub:
        return list(stub.AudioTranscriptionStream(request, timeout=60))


def refused(backend: Backend, request: pb.TranscriptRequest) -> str:
    details = set()
    for ask in (lambda: backend.call("AudioTranscription", request), lambda: streamed(backend, request)):
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        details.add(str(caught.value.details()))
    (only,) = details
    return only


def test_both_ways(hearing: Backend, upload: Path) -> None:
    request = pb.TranscriptRequest(dst=str(upload), diarize=True, threads=4, ModelIdentity=str(ensure("whisper")))
    result = hearing.call("AudioTranscription", request)
    kettle = LESSONS[0]
    assert (result.text, result.language, result.duration) == (kettle.text, "en", SECONDS)
    assert [(part.id, part.start, part.end, part.text) for part in result.segments] == [
        (index, round(start * SECOND), round(end * SECOND), text)
        for index, (start, text, end) in enumerate(kettle.phrases)
    ]
    assert all(part.tokens for part in result.segments)

    request.stream = True
    *deltas, last = streamed(hearing, request)
    assert "".join(delta.delta for delta in deltas) == kettle.text
    assert len(deltas) > 3
    assert last.final_result == result


def test_a_file_is_read_only_during_the_call(hearing: Backend, upload: Path) -> None:
    request = pb.TranscriptRequest(dst=str(upload))
    assert hearing.call("AudioTranscription", request).text
    upload.unlink()
    assert refused(hearing, request) == f"dst: there is no file '{upload}' on this machine"


def test_what_is_no_audio(hearing: Backend, tmp_path: Path) -> None:
    (tmp_path / "letter.wav").write_bytes(SECRET * 100)
    (tmp_path / "empty.wav").touch()
    os.mkfifo(tmp_path / "fifo.wav")
    for name, words in (
        ("letter.wav", "can't be decoded; it may be damaged, or is no audio of a known kind"),
        ("empty.wav", "is an empty file"),
        ("fifo.wav", "is the path of no regular file"),
        (".", "is the path of no regular file"),
    ):
        assert refused(hearing, pb.TranscriptRequest(dst=str(tmp_path / name))) == f"dst: {words}"


def test_another_model(hearing: Backend, upload: Path) -> None:
    request = pb.TranscriptRequest(dst=str(upload), ModelIdentity="another")
    with pytest.raises(grpc.RpcError) as caught:
        streamed(hearing, request)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    assert "model identity mismatch" in str(caught.value.details())


def test_what_it_does_not_do(hearing: Backend) -> None:
    with hearing.connection() as stub:
        for call, words in (
            (lambda: stub.Predict(pb.PredictOptions(Prompt="Hi"), timeout=60), "the loaded model transcribes speech"),
            (lambda: list(stub.AudioTranscriptionLive(iter(()), timeout=60)), "use AudioTranscription"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert words in str(caught.value.details())


def test_a_caller_who_goes_away(hearing: Backend, upload: Path) -> None:
    request = pb.TranscriptRequest(dst=str(upload))
    with hearing.connection() as stub:
        futures = [stub.AudioTranscription.future(request, timeout=60) for _ in range(6)]
        streams = [stub.AudioTranscriptionStream(request, timeout=60) for _ in range(6)]
        next(streams[0])
        for call in futures[::2] + streams[::2]:
            call.cancel()
        assert {future.result().text for future in futures[1::2]} == {LESSONS[0].text}
        for stream in streams[1::2]:
            assert list(stream)[-1].final_result.text == LESSONS[0].text
    assert hearing.call("AudioTranscription", request).text == LESSONS[0].text
