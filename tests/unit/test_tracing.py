"""Trace contexts as W3C's recommendation has them, and what an engine with traces leaves in the environment."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.tracing import extract_trace_context

from common import tracing
from common.errors import InvalidRequest
from common.tracing import sending_to, trace_headers

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    "parent",
    [
        PARENT,
        PARENT.replace("-01", "-00"),
        PARENT.replace("-01", "-ff"),
        PARENT.replace("00-4", "cc-4"),
        PARENT.replace("00-4", "cc-4") + "-what-the-future-brings",
    ],
)
def test_a_parent(parent: str) -> None:
    assert trace_headers([("user-agent", "x"), ("traceparent", parent), ("x-bin", b"\xff")]) == {"traceparent": parent}


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "none",
        PARENT[:-1],
        PARENT + "0",
        PARENT + "-00",
        PARENT + " ",
        PARENT + "\n",
        PARENT.upper(),
        PARENT.replace("00-4", "ff-4"),
        PARENT.replace("00-4", "cc-4") + ".",
        PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        PARENT.replace("00f067aa0ba902b7", "0" * 16),
        PARENT.replace("-00f", "_00f"),
        PARENT.replace("4bf", "\N{FULLWIDTH DIGIT FOUR}bf"),
        "x" * 10_000,
    ],
)
def test_a_malformed_parent_is_ignored_with_its_state(parent: str) -> None:
    assert trace_headers([("traceparent", parent), ("tracestate", "a=1")]) is None


def test_two_parents_are_none() -> None:
    assert trace_headers([("traceparent", PARENT), ("traceparent", PARENT)]) is None


def test_no_parent() -> None:
    assert trace_headers([]) is None
    assert trace_headers([("tracestate", "a=1")]) is None


def test_states_are_joined_in_their_order() -> None:
    metadata = [("tracestate", "a=1"), ("traceparent", PARENT), ("tracestate", "b=2,c=3")]
    assert trace_headers(metadata) == {"traceparent": PARENT, "tracestate": "a=1,b=2,c=3"}


@pytest.mark.parametrize("state", ["", "a=" + "x" * 600, "a=\N{SNOWMAN}"])
def test_a_state_that_cannot_be_passed_on_leaves_the_parent(state: str) -> None:
    assert trace_headers([("traceparent", PARENT), ("tracestate", state)]) == {"traceparent": PARENT}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["traceparent", "tracestate"]),
            st.one_of(
                st.just(PARENT),
                st.text(st.characters(min_codepoint=32, max_codepoint=126)),
                st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", fullmatch=True),
                st.binary(max_size=20),
            ),
        )
    )
)
def test_what_is_passed_on_never_raises_in_the_engine(metadata: list[tuple[str, str | bytes]]) -> None:
    # An exception there would end the task that all requests wait for.
    headers = trace_headers(metadata)
    if headers:
        from opentelemetry import trace

        context = trace.get_current_span(extract_trace_context(headers)).get_span_context()
        assert context.is_valid
        assert f"{context.trace_id:032x}" == headers["traceparent"].split("-")[1]


@pytest.fixture
def no_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_endpoints", set())


@pytest.mark.parametrize("before", [None, "http://users.own:4317"])
def test_the_endpoint_is_gone_when_the_engine_is_up(
    no_endpoints: None, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    if before is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, before)
    with sending_to("http://a:1"):
        os.environ[VARIABLE] = "http://a:1"  # as vLLM does
    assert os.environ.get(VARIABLE) == before


def test_one_endpoint_for_the_life_of_a_process(no_endpoints: None) -> None:
    for endpoint in (None, "http://a:1", None, "http://a:1"):
        with sending_to(endpoint):
            pass
    with pytest.raises(InvalidRequest, match=r"otlp_traces_endpoint: .* http://a:1 for good"), sending_to("http://b:1"):
        pass
