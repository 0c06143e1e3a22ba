"""What an engine shows of itself: traces to a collector, numbers to an observer, metrics in Prometheus' registry."""

import os
import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY

from backend.counters import Counters, Request, Stream
from common import request_context
from common.errors import InvalidRequest
from common.model import Model
from common.observation import Observer
from common.pb import backend_pb2 as pb
from common.tracing import trace_headers
from tests.engine.collector import Collector
from tests.engine.conftest import Engines
from tests.engine.wire import options
from tests.models.script import line

PARSERS = ("tool_parser:hermes", "reasoning_parser:none")
MALFORMED = "00-00000000000000000000000000000000-00f067aa0ba902b7-01"


def vllm_samples() -> dict[str, float]:
    """vLLM's numbers by name, over all their labels."""
    found: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def with_trace(metadata: list[tuple[str, str]]) -> None:
    """What the present test asks for belongs to this trace."""
    request_context.trace_headers.set(trace_headers(metadata))


async def stream(model: Model, request: pb.PredictOptions, observer: Observer | None = None) -> pb.Reply:
    """The last chunk of a stream."""
    return [chunk async for chunk in model.predict_stream(request, observer)][-1]


async def test_what_an_observer_is_told(model: Model) -> None:
    counters = Counters()
    last = await stream(model, options(line("plain")), Stream(counters))
    assert (counters.prompt_tokens, counters.completion_tokens) == (last.prompt_tokens, last.tokens)
    assert sum(counters.first_token.counts) == 1
    assert sum(counters.inter_token.counts) <= last.tokens - 1
    assert counters.first_token.sum > 0
    assert sum(counters.queued.counts) == 1
    whole = await model.predict(options(line("plain")), Request(counters))
    assert counters.completion_tokens == last.tokens + whole.tokens
    assert sum(counters.first_token.counts) == 1
    assert sum(counters.queued.counts) == 2


async def test_the_numbers_of_an_engine_that_is_gone_are_gone_too(engines: Engines, model: Model) -> None:
    await model.predict(options(line("plain")))
    assert vllm_samples()["vllm:generation_tokens_total"] > 0
    await engines.close()
    assert not vllm_samples()
    reply = await (await engines.get(*PARSERS)).predict(options(line("plain")))
    assert vllm_samples()["vllm:generation_tokens_total"] == reply.tokens


async def test_without_statistics_an_observer_is_told_all_but_the_queue(engines: Engines) -> None:
    counters = Counters()
    model = await engines.get(*PARSERS, "--disable-log-stats")
    last = await stream(model, options(line("plain")), Stream(counters))
    assert not vllm_samples()
    assert counters.completion_tokens == last.tokens
    assert sum(counters.first_token.counts) == 1
    assert sum(counters.queued.counts) == 0


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
async def traced(engines: Engines, collector: Collector) -> Model:
    return await engines.get(*PARSERS, f"--otlp-traces-endpoint:{collector.endpoint}")


async def test_the_span_of_a_request_belongs_to_its_callers_trace(
    traced: Model, engines: Engines, collector: Collector
) -> None:
    assert traced.traced
    # Nothing of it is left for the next engine.
    assert "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" not in os.environ
    asked: dict[str, tuple[str, str]] = {}
    for answer in (traced.predict, lambda request: stream(traced, request)):
        trace, parent = secrets.token_hex(16), secrets.token_hex(8)
        with_trace([("traceparent", f"00-{trace}-{parent}-01"), ("tracestate", "a=1")])
        request = options(line("plain"), CorrelationId=f"request-{len(asked)}")
        reply: Any = await answer(request)
        assert reply.tokens > 0
        asked[request.CorrelationId] = (trace, parent)
    scored, parent = secrets.token_hex(16), secrets.token_hex(8)
    with_trace([("traceparent", f"00-{scored}-{parent}-01")])
    await traced.score(pb.ScoreRequest(prompt="A", candidates=["B", "C"]))
    # Ignored, and the request served.
    with_trace([("traceparent", MALFORMED)])
    await traced.predict(options(line("plain"), CorrelationId="request-2"))
    # The end of the engine sends what is left, long before the next batch would go.
    await engines.close()
    spans = {_attribute(span, "gen_ai.request.id"): span for span in collector.named("llm_request")}
    probes = [spans.pop(name) for name in list(spans) if name.startswith("score-")]
    assert {(span.trace_id.hex(), span.parent_span_id.hex()) for span in probes} == {(scored, parent)}
    assert spans.keys() == {"request-0", "request-1", "request-2"}
    for name, (trace, parent) in asked.items():
        span = spans[name]
        assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (trace, parent, "a=1")
    assert spans["request-2"].trace_id.hex() != "0" * 32
    assert spans["request-2"].parent_span_id.hex() != "00f067aa0ba902b7"


async def test_the_next_engine_has_the_same_collector_and_no_other(
    traced: Model, engines: Engines, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    trace = secrets.token_hex(16)
    with_trace([("traceparent", f"00-{trace}-00f067aa0ba902b7-01")])
    await traced.predict(options(line("plain")))
    await engines.close()
    assert trace in [span.trace_id.hex() for span in collector.named("llm_request")]
    assert "were not sent" not in caplog.text
    with pytest.raises(InvalidRequest, match=f"otlp_traces_endpoint: .*{collector.endpoint} for good"):
        await engines.get(*PARSERS, "--otlp-traces-endpoint:http://127.0.0.1:1")


async def test_a_collector_that_is_gone_costs_no_request(
    engines: Engines, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    # The last test: the collector is gone for the others as well.
    model = await engines.get(*PARSERS, f"--otlp-traces-endpoint:{collector.endpoint}")
    collector.stop()
    assert (await model.predict(options(line("plain")))).tokens > 0
    await engines.close()
    assert "the last traces were not sent" in caplog.text


def _attribute(span: Any, name: str) -> str:
    return next((str(a.value.string_value) for a in span.attributes if a.key == name), "")
