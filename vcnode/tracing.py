"""Traces: one span per command, with the phases of a start and the calls of drivers below it.

The sender's trace goes on where its ``traceparent`` header says; what the command causes (events, log lines,
exemplars) carries the trace whether this node exports spans or not. OpenTelemetry is imported when there is
somewhere to send spans to, and not before.

Source: W3C Trace Context, level 1; OpenTelemetry semantic conventions for RPC spans.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from vcnode.errors import FailedPreconditionError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

log = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 3.0
"""Limit of one export, retries included."""
CLOSE_TIMEOUT_S = 5.0
TRACE_ID = slice(3, 35)
"""Where the trace id stands in a traceparent: after the version's two digits and a hyphen."""


def trace_id_of(traceparent: str | None) -> str | None:
    """The id of the trace, 32 hexadecimal digits."""
    return None if traceparent is None else traceparent[TRACE_ID]


def current() -> str | None:
    """The ``traceparent`` of the span that this program is in; None without one.

    A program that has a span has imported OpenTelemetry: to ask costs one look-up where it has not.
    """
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    return _header(trace.get_current_span().get_span_context())


def _header(context: Any) -> str | None:
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class CommandSpan:
    """The span of one command, or, where none is made, what its sender has said."""

    def __init__(self, traceparent: str | None) -> None:
        self.traceparent = traceparent
        """What the command's effects carry."""

    def ended(self, code: str) -> None:
        """The command was answered with *code*, ``ok`` or an error's."""


class Tracing:
    """Tracing that is off: traces are passed on, and spans are not made."""

    def command(
        self, verb: str, command_id: str, traceparent: str | None, *, way: Literal["rpc", "cmd"]
    ) -> contextlib.AbstractContextManager[CommandSpan]:
        """The time in which a command is carried out.

        Args:
            verb: The command.
            command_id: Its id.
            traceparent: As its sender gave it, well-formed.
            way: How it came.
        """
        return contextlib.nullcontext(CommandSpan(traceparent))

    def call(self, operation: str) -> contextlib.AbstractContextManager[None]:
        """The time of a driver's call, such as ``agent.connect``."""
        return contextlib.nullcontext()

    def phase(self, name: str, seconds: float) -> None:
        """A phase of a start has ended just now, after *seconds*."""

    async def close(self) -> None:
        """Send what waits, for a few seconds at most."""


class _RecordedSpan(CommandSpan):
    """A span that is exported."""

    def __init__(self, span: Any, failed: Any) -> None:
        super().__init__(_header(span.get_span_context()))
        self._span = span
        self._failed = failed

    def ended(self, code: str) -> None:
        self._span.set_attribute("vcnode.code", code)
        if code != "ok":
            self._span.set_status(self._failed, code)


class OtelTracing(Tracing):
    """Tracing with OpenTelemetry.

    Args:
        node_name: Told as ``service.instance.id``.
        version: Told as ``service.version``.
        sample_ratio: Share of the commands without a trace of their sender's that begin one.
        processor: Takes the spans.
    """

    def __init__(self, node_name: str, version: str, sample_ratio: float, processor: SpanProcessor) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation import tracecontext

        resource = Resource.create(
            {"service.name": "vcnode", "service.version": version, "service.instance.id": node_name}
        )
        # Not the global provider: a program may hold several nodes, and tests do.
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(sample_ratio), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("vcnode", version)
        self._propagator = tracecontext.TraceContextTextMapPropagator()
        self._trace = trace

    @contextlib.contextmanager
    def command(
        self, verb: str, command_id: str, traceparent: str | None, *, way: Literal["rpc", "cmd"]
    ) -> Iterator[CommandSpan]:
        """See `Tracing`."""
        trace = self._trace
        carrier = {} if traceparent is None else {"traceparent": traceparent}
        with self._tracer.start_as_current_span(
            verb,
            # Its sender's context or none: that of the task is left over from whoever began it.
            context=self._propagator.extract(carrier, context=trace.set_span_in_context(trace.INVALID_SPAN)),
            kind=trace.SpanKind.SERVER if way == "rpc" else trace.SpanKind.CONSUMER,
            attributes={
                "rpc.system": "nats",
                "rpc.method": verb,
                "vcnode.command_id": command_id,
            },
        ) as span:
            yield _RecordedSpan(span, trace.StatusCode.ERROR)

    @contextlib.contextmanager
    def call(self, operation: str) -> Iterator[None]:
        """See `Tracing`. Outside of a command's span, as in a watcher that outlives it, none is made."""
        if not self._trace.get_current_span().is_recording():
            yield
            return
        with self._tracer.start_as_current_span(operation, kind=self._trace.SpanKind.CLIENT):
            yield

    def phase(self, name: str, seconds: float) -> None:
        """See `Tracing`."""
        if not self._trace.get_current_span().is_recording():
            return
        ended = time.time_ns()
        span = self._tracer.start_span(f"phase {name}", start_time=ended - int(seconds * 1e9))
        span.end(ended)

    async def close(self) -> None:
        """See `Tracing`."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            log.warning("The last spans were not sent within %g s and are lost", CLOSE_TIMEOUT_S)


def open_tracing(node_name: str, version: str, *, endpoint: str, sample_ratio: float) -> Tracing:
    """Tracing to the OTLP/HTTP *endpoint*, such as ``http://collector:4318/v1/traces``; empty: off.

    Certificates and headers are those of the ``OTEL_EXPORTER_OTLP_…`` environment variables.

    Raises:
        FailedPreconditionError: There is an endpoint, and OpenTelemetry is not installed.
    """
    if not endpoint:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise FailedPreconditionError(
            "tracing.endpoint is set, and OpenTelemetry is not installed: "
            "install vcnode[otel], or leave the endpoint empty."
        ) from exc
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
    return OtelTracing(node_name, version, sample_ratio, BatchSpanProcessor(exporter))
