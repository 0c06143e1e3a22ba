"""An OpenTelemetry collector in small: OTLP over gRPC, which keeps the spans that it is sent."""

from concurrent import futures
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """On a free port, while the block runs.

    Attributes:
        spans: all so far.
        endpoint: as vLLM takes it.

    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Listen no more."""
        self._server.stop(None).wait()

    def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802  # the wire's name
        """Keep what comes."""
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        """The spans of that name."""
        return [span for span in self.spans if span.name == name]
