"""Traces: what is passed on, what is recorded, and where it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.unit.handlers.fakes import World
from vcnode.errors import FailedPreconditionError
from vcnode.models import wire
from vcnode.tracing import OtelTracing, Tracing, current, open_tracing, trace_id_of

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
GIVEN = f"00-{TRACE_ID}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-00"


class Recorded:
    """Tracing, and the spans that it has made."""

    def __init__(self, sample_ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = OtelTracing("n1", "1.2.3", sample_ratio, SimpleSpanProcessor(self.exporter))

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


def test_off_passes_the_senders_trace_on_and_imports_nothing() -> None:
    with Tracing().command("pod.run", "c1", GIVEN, way="rpc") as span:
        assert span.traceparent == GIVEN
        span.ended("ok")
    code = "import sys, vcnode.node, vcnode.tracing as t; t.current(); print('opentelemetry' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_a_command_goes_on_with_its_senders_trace(recorded: Recorded) -> None:
    with recorded.tracing.command("pod.run", "c1", GIVEN, way="rpc") as span:
        with recorded.tracing.call("agent.connect"):
            pass
        recorded.tracing.phase("boot", 0.25)
        span.ended("aborted")
    spans = recorded.spans
    command = spans["pod.run"]
    assert f"{command.context.trace_id:032x}" == TRACE_ID
    assert f"{command.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.traceparent == f"00-{TRACE_ID}-{command.context.span_id:016x}-01"
    assert command.attributes["vcnode.command_id"] == "c1"
    assert command.attributes["vcnode.code"] == "aborted"
    assert not command.status.is_ok
    assert command.resource.attributes["service.instance.id"] == "n1"
    for name in ("agent.connect", "phase boot"):
        assert spans[name].parent.span_id == command.context.span_id
    boot = spans["phase boot"]
    assert boot.end_time - boot.start_time == 250_000_000


@pytest.mark.parametrize(
    ("given", "ratio", "spans"), [(None, 1.0, 1), (None, 0.0, 0), (GIVEN, 0.0, 1), (UNSAMPLED, 1.0, 0)]
)
def test_the_sender_decides_and_else_the_ratio(given: str | None, ratio: float, spans: int) -> None:
    recorded = Recorded(ratio)
    with recorded.tracing.command("pod.run", "c1", given, way="cmd") as span:
        pass
    assert len(recorded.spans) == spans
    assert given is None or trace_id_of(span.traceparent) == TRACE_ID


async def test_what_outlives_its_command_makes_no_spans(recorded: Recorded) -> None:
    over = asyncio.Event()

    async def watch() -> None:
        await over.wait()
        with recorded.tracing.call("agent.ping"):
            recorded.tracing.phase("boot", 1)

    with recorded.tracing.command("pod.run", "c1", None, way="rpc"):
        watcher = asyncio.create_task(watch())
    over.set()
    await watcher
    assert recorded.spans.keys() == {"pod.run"}


async def test_the_effects_of_a_command_carry_its_span(recorded: Recorded) -> None:
    world = World(tracing=recorded.tracing)
    outcome = await world.dispatcher.dispatch("pod.start", {"traceparent": GIVEN}, b'{"pod_id": "p1"}')
    assert outcome.ok
    call = world.pods.last_call
    assert call is not None
    assert call.traceparent == outcome.traceparent
    assert trace_id_of(outcome.traceparent) == TRACE_ID
    assert outcome.traceparent != GIVEN
    assert world.counter.traces == [outcome.traceparent]
    assert recorded.spans["pod.start"].attributes["vcnode.code"] == "ok"


async def test_a_refused_command_has_a_span_with_its_code(recorded: Recorded) -> None:
    world = World(tracing=recorded.tracing)
    outcome = await world.dispatcher.dispatch("pod.start", {"traceparent": GIVEN}, b"nonsense")
    assert outcome.code == "invalid_argument"
    assert recorded.spans["pod.start"].attributes["vcnode.code"] == "invalid_argument"


async def test_a_malformed_trace_begins_a_new_one(recorded: Recorded) -> None:
    world = World(tracing=recorded.tracing)
    headers = {wire.TRACEPARENT: f"00-{'0' * 32}-b7ad6b7169203331-01"}
    await world.dispatcher.dispatch("pod.start", headers, b'{"pod_id": "p1"}')
    assert recorded.spans["pod.start"].parent is None


def test_a_program_is_in_the_span_that_it_says() -> None:
    assert current() is None
    with TracerProvider(shutdown_on_exit=False).get_tracer("t").start_as_current_span("s") as span:
        context = span.get_span_context()
        assert current() == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_an_endpoint_without_opentelemetry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(FailedPreconditionError, match=r"vcnode\[otel\]"):
        open_tracing("n1", "1", endpoint="http://127.0.0.1:4318/v1/traces", sample_ratio=1)
    assert type(open_tracing("n1", "1", endpoint="", sample_ratio=1)) is Tracing
