"""One trace from a scheduler's span through a node to its events, its metrics and a real OTLP port."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nats
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider

from tests.integration.conftest import mock_settings
from tests.support.nats import NatsServer
from vcnode.client import Client
from vcnode.models.events import Event
from vcnode.models.pod import Cmd, ContainerSpec, PodSpec
from vcnode.node import running
from vcnode.settings import TracingSettings
from vcnode.tracing import trace_id_of

pytestmark = pytest.mark.nats

LIMIT_S = 20


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, as `name, trace, span, parent`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[tuple[str, str, str, str]] = []
        self.resources: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Collector)
        body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in body.resource_spans:
            server.resources.append({a.key: a.value.string_value for a in resource.resource.attributes})
            for scope in resource.scope_spans:
                server.spans += [
                    (s.name, s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex()) for s in scope.spans
                ]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _openmetrics(address: str) -> str:
    request = urllib.request.Request(f"http://{address}/metrics")
    request.add_header("Accept", "application/openmetrics-text; version=1.0.0")
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        return answer.read().decode()


async def test_one_trace_from_the_scheduler_to_the_events(
    nats_server: NatsServer, short_dir: Path, collector: Collector
) -> None:
    settings = mock_settings(short_dir / "n1", nats_server.url).model_copy(
        update={"tracing": TracingSettings(endpoint=collector.url)}
    )
    spec = PodSpec(
        id="p1",
        containers=(ContainerSpec(id="main", rootfs=str(short_dir / "n1/roots"), cmd=Cmd(args=("/bin/x",))),),
    )
    events: list[Event] = []
    async with asyncio.timeout(LIMIT_S), running(settings) as node:
        await node.connection.wait_connected()
        watcher = await nats.connect(nats_server.url)
        told = await watcher.subscribe("vcnode.evt.n1.>")
        await watcher.flush()
        tracer = TracerProvider(shutdown_on_exit=False).get_tracer("scheduler")
        async with await Client.connect(nats_server.url) as client:
            with tracer.start_as_current_span("place") as place:
                await client.node("n1").pod_run(spec)
        while not events or events[-1].kind != "audit.done":
            events.append(Event.model_validate_json((await told.next_msg(timeout=LIMIT_S)).data))
        assert node.http_address is not None
        metrics = await asyncio.to_thread(_openmetrics, node.http_address)
        await watcher.close()

    trace_id = f"{place.get_span_context().trace_id:032x}"
    spans = {name: (trace, span, parent) for name, trace, span, parent in collector.spans}
    assert {trace for trace, _, _ in spans.values()} == {trace_id}
    assert spans["pod.run"][2] == f"{place.get_span_context().span_id:016x}"
    below = {name for name, (_, _, parent) in spans.items() if parent == spans["pod.run"][1]}
    assert {"phase network", "phase containers", "phase total"} <= below
    assert {"network.attach", "hypervisor.launch", "agent.connect", "agent.create_container"} <= below
    assert collector.resources[0]["service.instance.id"] == "n1"

    of_command = {event.kind: event.traceparent for event in events if event.commandid is not None}
    assert {"pod.created", "pod.started", "container.started", "audit.done"} <= of_command.keys()
    assert {trace_id_of(trace) for trace in of_command.values()} == {trace_id}
    assert {event.traceparent for event in events if event.commandid is None} <= {None}
    assert f'trace_id="{trace_id}"' in metrics
