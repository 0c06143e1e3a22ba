"""One server, one load of the scripted model, and everything that an orchestrator asks of it while it serves."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from common.pb import backend_pb2 as pb
from tests.models.dialogue import Line
from tests.models.script import line, script
from tests.process.orchestrator import PROBE_SECONDS, Backend, Heart, Watch, connect, eventually
from tests.process.wire import (
    ENDLESS,
    PARSERS,
    REPLACEMENT,
    calls,
    chat,
    check_shape,
    content,
    model_options,
    predict_options,
    raw,
    stream_calls,
)

LINES = [pytest.param(line, id=line.name) for line in script()]


def expected_text(line: Line) -> str:
    """All that the model writes but its tool calls; without a reasoning parser, thoughts are text."""
    return line.answer.partition("<tool_call>")[0].strip()


def expected_calls(line: Line) -> list[tuple[str, Any]]:
    return [(call.name, dict(call.arguments)) for call in line.tool_calls]


def refusal(backend: Backend, rpc: str, request: Any) -> tuple[grpc.StatusCode, str]:
    """The status that a request must get instead of an answer; a stream must get the same as a unary call."""
    with pytest.raises(grpc.RpcError) as raised:
        backend.call(rpc, request)
    code, details = raised.value.code(), raised.value.details() or ""
    if rpc == "Predict":
        with pytest.raises(grpc.RpcError) as streamed:
            backend.stream(request)
        assert (streamed.value.code(), streamed.value.details()) == (code, details)
    return code, details


def is_idle(process: psutil.Process) -> bool:
    """Whether the engine does nothing; its main loop sleeps when there are no requests."""
    before = process.cpu_times()
    time.sleep(0.4)
    after = process.cpu_times()
    return (after.user + after.system) - (before.user + before.system) < 0.1


def worker(backend: Backend) -> psutil.Process:
    """The process that computes."""
    return max(backend.children(), key=lambda process: sum(process.cpu_times()[:2]))


# The load


def test_status_during_the_load_is_busy_with_a_stage(first_load: Watch) -> None:
    assert not first_load.failures
    states = [status.state for status in first_load.seen]
    busy = [status for status in first_load.seen if status.state == pb.StatusResponse.BUSY]
    assert busy
    assert {state for state, _ in itertools.groupby(states)} <= {
        pb.StatusResponse.UNINITIALIZED,
        pb.StatusResponse.BUSY,
        pb.StatusResponse.READY,
    }
    stages = [name for status in busy for name in status.memory.breakdown if name.startswith("loading, ")]
    print("stages seen in Status:", ", ".join(stage for stage, _ in itertools.groupby(stages)))
    assert len(set(stages)) >= 3
    # A stage never comes back.
    assert len([*itertools.groupby(stages)]) == len(set(stages))


def test_status_after_the_load_is_ready(served: Backend) -> None:
    status = served.status()
    assert status.state == pb.StatusResponse.READY
    held = {name: status.memory.breakdown.pop(name) for name in ("weights", "KV cache")}
    assert all(size > 1024 * 1024 for size in held.values())
    # What the engine holds is in its processes, and counts once.
    assert status.memory.total == sum(status.memory.breakdown.values())
    assert not [name for name in status.memory.breakdown if name.startswith("loading")]
    assert len(status.memory.breakdown) >= 2  # the server and its engine
    assert all(size > 1024 * 1024 for size in status.memory.breakdown.values())


def test_log_has_the_stages_of_the_load(served: Backend) -> None:
    stages = [
        text.partition("load: ")[2] for text in served.stderr.splitlines() if " took " in text and "load: " in text
    ]
    names = [stage.partition(" took ")[0] for stage in stages]
    print("\n".join(stages))
    assert names[0] == "importing vLLM"
    assert "loading weights" in names
    assert len(names) == len(set(names)) >= 5
    assert "load: ready in " in served.stderr


def test_standard_output_stays_empty(served: Backend) -> None:
    assert served.stdout == ""


def test_same_load_again_changes_nothing(served: Backend, scripted: Path) -> None:
    before = [process.pid for process in served.engine_cores()]
    assert len(before) == 1
    for _ in range(2):
        assert served.load(model_options(scripted, *PARSERS)).success
    assert [process.pid for process in served.engine_cores()] == before
    assert served.status().state == pb.StatusResponse.READY


# Answers


@pytest.mark.parametrize("line", LINES)
def test_line_of_the_script(served: Backend, line: Line) -> None:
    unary: pb.Reply = served.call("Predict", predict_options(line))
    (delta,) = unary.chat_deltas
    assert unary.message.decode().strip() == expected_text(line)
    assert delta.content == unary.message.decode()
    assert calls(delta.tool_calls) == expected_calls(line)
    assert all(call.id for call in delta.tool_calls)

    replies = served.stream(predict_options(line))
    check_shape(replies)
    assert content(replies).strip() == expected_text(line)
    assert stream_calls(replies) == expected_calls(line)

    last = replies[-1]
    assert (last.tokens, last.prompt_tokens) == (unary.tokens, unary.prompt_tokens)
    assert unary.timing_prompt_processing > 0
    assert unary.timing_token_generation > 0


def test_text_without_a_tool_call_is_exact(served: Backend) -> None:
    for name in ("unicode", "markup", "json", "raw"):
        assert served.call("Predict", predict_options(line(name))).message.decode() == line(name).content
        assert content(served.stream(predict_options(line(name)))) == line(name).content


def test_text_comes_in_many_chunks(served: Backend) -> None:
    replies = served.stream(predict_options(line("long")))
    assert len(replies) > 20


def test_prompt_is_ignored_beside_messages(served: Backend) -> None:
    request = predict_options(line("plain"), Prompt="What the Go template made of it")
    assert served.call("Predict", request).message.decode() == line("plain").content


def test_characters_that_are_cut_off_are_left_out(served: Backend) -> None:
    # An emoji is four tokens: somewhere the limit falls into one.
    whole = line("unicode").content
    cut = 0
    for tokens in range(1, 30):
        request = predict_options(line("unicode"), Tokens=tokens)
        replies = served.stream(request)
        check_shape(replies)
        text = content(replies)
        assert REPLACEMENT not in text
        assert whole.startswith(text)
        assert replies[-1].tokens == tokens
        unary = served.call("Predict", request)
        assert unary.message.decode() == text
        cut += len(replies) - 1 < tokens
    assert cut


def test_log_probabilities_come_in_the_last_chunk(served: Backend) -> None:
    request = predict_options(line("plain"), Logprobs=2, TopLogprobs=2)
    replies = served.stream(request)
    check_shape(replies)
    entries = json.loads(replies[-1].logprobs)["content"]
    assert len(entries) == replies[-1].tokens
    assert "".join(entry["token"] for entry in entries).startswith(line("plain").content)
    assert all(math.isfinite(entry["logprob"]) and len(entry["top_logprobs"]) == 2 for entry in entries)
    unary = json.loads(served.call("Predict", request).logprobs)["content"]
    assert [entry["id"] for entry in unary] == [entry["id"] for entry in entries]


def test_tokens_and_back(served: Backend) -> None:
    text = "The capital of 東京 is 👋🏽."
    tokens = served.call("TokenizeString", raw(text))
    assert tokens.length == len(tokens.tokens) > 0
    assert served.call("Detokenize", pb.DetokenizeRequest(tokens=tokens.tokens)).content == text


def test_tokens_of_a_chat_are_those_of_its_prompt(served: Backend) -> None:
    for name in ("plain", "tool", "tool_result"):
        request = predict_options(line(name))
        tokens = served.call("TokenizeString", request)
        assert tokens.length == served.call("Predict", request).prompt_tokens
    text = served.call("Detokenize", pb.DetokenizeRequest(tokens=tokens.tokens)).content
    assert "<|im_start|>user\nWhat is the weather in Paris?" in text


def test_nothing_to_detokenize(served: Backend) -> None:
    assert served.call("Detokenize", pb.DetokenizeRequest()).content == ""


def test_model_identity(served: Backend, scripted: Path) -> None:
    for identity in ("", str(scripted)):
        assert served.call("Predict", predict_options(line("plain"), ModelIdentity=identity)).message
    for rpc in ("Predict", "TokenizeString"):
        code, details = refusal(served, rpc, predict_options(line("plain"), ModelIdentity="another"))
        assert code == grpc.StatusCode.NOT_FOUND
        assert "model identity mismatch" in details


# Refusals


def _chat_with(**message: Any) -> pb.PredictOptions:
    return pb.PredictOptions(UseTokenizerTemplate=True, Messages=[pb.Message(**message)])


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("Tools", chat("a", Tools="{broken")),
        ("Tools", chat("a", Tools='{"an": "object"}')),
        ("Tools[0]", chat("a", Tools="[1]")),
        ("Tools[0].function.name", chat("a", Tools='[{"type": "function", "function": {}}]')),
        ("ToolChoice", predict_options(line("tool"), ToolChoice='{"type": ')),
        ("ToolChoice", predict_options(line("tool"), ToolChoice="sometimes")),
        ("ToolChoice", predict_options(line("tool"), ToolChoice='{"type": "function", "function": {"name": "f"}}')),
        ("ToolChoice", chat("a", ToolChoice="required")),
        ("LogitBias", chat("a", LogitBias="{broken")),
        ("LogitBias", chat("a", LogitBias='{"1": 1e3}')),
        ("LogitBias", chat("a", LogitBias='{"one": 1}')),
        ("LogitBias", chat("a", LogitBias='{"1": NaN}')),
        ("LogitBias", chat("a", LogitBias='{"99999999": 1}')),
        ("Metadata", chat("a", Metadata={"chat_template_kwargs": "{broken"})),
        ("Metadata", chat("a", Metadata={"chat_template_kwargs": "[]"})),
        ("Metadata", chat("a", Metadata={"enable_thinking": "perhaps"})),
        ("Metadata", chat("a", Metadata={"reasoning_effort": "heroic"})),
        ("Metadata", chat("a", Metadata={"response_format": "{broken"})),
        ("Metadata", chat("a", Metadata={"json_schema": "{broken"})),
        ("Temperature", chat("a", Temperature=math.nan)),
        ("Temperature", chat("a", Temperature=math.inf)),
        ("Temperature", chat("a", Temperature=-1)),
        ("Temperature", chat("a", Temperature=2.5)),
        ("TopP", chat("a", TopP=1.5)),
        ("TopP", chat("a", TopP=math.nan)),
        ("TopK", chat("a", TopK=-2)),
        ("MinP", chat("a", MinP=-0.5)),
        ("Penalty", chat("a", Penalty=-1)),
        ("FrequencyPenalty", chat("a", FrequencyPenalty=3)),
        ("PresencePenalty", chat("a", PresencePenalty=-math.inf)),
        ("Logprobs", chat("a", Logprobs=-1)),
        ("TopLogprobs", chat("a", TopLogprobs=21)),
        ("StopPrompts", chat("a", StopPrompts=[""])),
        ("Grammar", chat("a", Grammar="root ::= (")),
        ("Prompt", pb.PredictOptions()),
        ("Prompt", pb.PredictOptions(UseTokenizerTemplate=True)),
        ("Prompt", raw("fox " * 5000)),
        ("Prompt", raw("fox " * 250_000)),
        ("Messages", chat("fox " * 5000)),
        ("Messages[0].role", _chat_with(role="robot", content="a")),
        ("Messages[0].role", _chat_with(content="a")),
        ("Messages[0].tool_calls", _chat_with(role="assistant", tool_calls="{broken")),
        ("Messages[0].tool_calls", _chat_with(role="user", content="a", tool_calls="[{}]")),
    ],
)
def test_value_that_cannot_be_used(served: Backend, field: str, request_: pb.PredictOptions) -> None:
    code, details = refusal(served, "Predict", request_)
    assert code == grpc.StatusCode.INVALID_ARGUMENT, details
    assert details.startswith(field), details
    # The caller reads one sentence, not a dump of its own prompt.
    assert len(details) < 600


@pytest.mark.parametrize("token", [-1, 100_000])
def test_token_that_is_none(served: Backend, token: int) -> None:
    code, details = refusal(served, "Detokenize", pb.DetokenizeRequest(tokens=[5, token]))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert details.startswith("tokens[1]")
    assert str(token) in details


def test_message_over_the_limit(served: Backend) -> None:
    with connect(served.addr, largest_message=-1) as stub, pytest.raises(grpc.RpcError) as raised:
        stub.Predict(raw("x" * (50 * 1024 * 1024 + 1)), timeout=60)
    assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("rpc", "request_"),
    [
        ("Embedding", pb.PredictOptions(Embeddings="a")),
        ("Rerank", pb.RerankRequest(query="a", documents=["b"])),
        ("TokenClassify", pb.TokenClassifyRequest(text="a")),
        ("AudioTranscription", pb.TranscriptRequest(dst="a.wav")),
    ],
)
def test_what_this_model_cannot_do(served: Backend, rpc: str, request_: Any) -> None:
    code, details = refusal(served, rpc, request_)
    assert code == grpc.StatusCode.UNIMPLEMENTED
    assert rpc in details


def test_stream_that_this_model_cannot_do(served: Backend) -> None:
    with served.connection() as stub, pytest.raises(grpc.RpcError) as raised:
        list(stub.AudioTranscriptionStream(pb.TranscriptRequest(dst="a.wav"), timeout=10))
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_rpc_that_the_wire_does_not_have(served: Backend) -> None:
    with grpc.insecure_channel(served.addr) as channel:
        rpc: Callable[..., Any] = channel.unary_unary("/backend.Backend/Fly", None, None)
        with pytest.raises(grpc.RpcError) as raised:
            rpc(b"", timeout=10)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_message(served: Backend) -> None:
    with grpc.insecure_channel(served.addr) as channel:
        rpc: Callable[..., Any] = channel.unary_unary("/backend.Backend/Predict", None, None)
        with pytest.raises(grpc.RpcError) as raised:
            rpc(b"\xff\xff\xff", timeout=10)
    assert raised.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)


# Many at once, and those that go away


def test_sixteen_streams_on_sixteen_connections(served: Backend) -> None:
    lines = list(itertools.islice(itertools.cycle(script()), 16))
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda line: served.stream(predict_options(line)), lines))
    for asked, replies in zip(lines, answers, strict=True):
        check_shape(replies)
        assert content(replies).strip() == expected_text(asked), asked.name
        assert stream_calls(replies) == expected_calls(asked), asked.name


def _first_chunks(call: Iterator[pb.Reply], count: int = 3) -> None:
    assert len([*itertools.islice(call, count)]) == count


def test_stream_that_is_cancelled_leaves_the_engine_idle(served: Backend) -> None:
    engine = worker(served)
    with ThreadPoolExecutor(4) as pool:

        def cancelled(_: int) -> None:
            with served.connection() as stub:
                call = stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60)
                _first_chunks(call)
                call.cancel()

        list(pool.map(cancelled, range(4)))
    eventually(lambda: is_idle(engine), 3, "the engine stops working on what nobody reads")
    assert served.status().state == pb.StatusResponse.READY
    assert content(served.stream(predict_options(line("long")))) == line("long").content


def test_unary_call_that_is_cancelled_leaves_the_engine_idle(served: Backend) -> None:
    engine = worker(served)
    with served.connection() as stub:
        call = stub.Predict.future(predict_options(line("long"), **ENDLESS), timeout=60)
        eventually(lambda: not is_idle(engine), 10, "the engine works")
        call.cancel()
    eventually(lambda: is_idle(engine), 3, "the engine stops working on what nobody reads")
    assert served.call("Predict", predict_options(line("plain"))).message.decode() == line("plain").content


def test_deadline_of_the_client_leaves_the_engine_idle(served: Backend) -> None:
    engine = worker(served)
    with pytest.raises(grpc.RpcError) as raised:
        served.stream(predict_options(line("long"), **ENDLESS), timeout=0.5)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: is_idle(engine), 3, "the engine stops working on what nobody reads")


def test_connection_that_breaks_leaves_the_engine_idle(served: Backend) -> None:
    engine = worker(served)
    with served.connection() as stub:
        _first_chunks(stub.PredictStream(predict_options(line("long"), **ENDLESS), timeout=60))
    eventually(lambda: is_idle(engine), 3, "the engine stops working on what nobody reads")
    assert served.status().state == pb.StatusResponse.READY


def test_log_has_no_prompt(served: Backend) -> None:
    assert "capital of France" not in served.stderr
    assert "Traceback" not in served.stderr


def test_health_was_answered_all_the_time(served: Backend, heart: Heart) -> None:
    heart.check()
    assert heart.worst < PROBE_SECONDS
