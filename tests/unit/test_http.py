import asyncio
import contextlib
import gzip
import socket

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from vcnode.errors import InvalidArgumentError, UnavailableError
from vcnode.http import MAX_HEAD_BYTES, HttpServer, parse_address, parse_head


class Node:
    """A server with one counter, and the state that its readiness reports."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        Counter("things", "Things.", registry=self.registry).inc(42)
        self.ready = (True, "ready")

    def ask(self):
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready


@pytest.fixture
def node():
    return Node()


@pytest.fixture
async def start(node):
    servers = []

    async def start(**limits):
        server = HttpServer(node.registry, node.ask, **limits)
        servers.append(server)
        return await server.start("127.0.0.1:0")

    yield start
    for server in servers:
        await server.close()


@pytest.fixture
async def address(start):
    return await start()


async def send(address, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(data)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def get(address, path, headers="", method="GET"):
    answer = await send(address, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), fields, body


async def test_metrics_are_served_as_text(address):
    status, fields, body = await get(address, "/metrics")
    assert (status, fields["content-type"].split(";")[0]) == (200, "text/plain")
    assert b"things_total 42.0" in body
    assert int(fields["content-length"]) == len(body)


async def test_what_is_shown_is_brought_up_to_date_before(node, start):
    gauge = Gauge("fresh", "Set when somebody asks.", registry=node.registry)
    asked = []

    async def prepare():
        asked.append("prepare")
        gauge.set(len(asked))

    address = await start(prepare=prepare)
    await get(address, "/healthz")
    for number in (1, 2):
        _, _, body = await get(address, "/metrics")
        assert f"fresh {number}.0".encode() in body


async def test_metrics_are_served_in_the_format_that_was_asked_for(address):
    _, fields, body = await get(
        address, "/metrics?x=1", "Accept: application/openmetrics-text; version=1.0.0\r\n"
    )
    assert fields["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


async def test_metrics_are_compressed_for_those_who_can_read_it(address):
    _, fields, body = await get(address, "/metrics", "Accept-Encoding: br, gzip;q=0.5\r\n")
    assert fields["content-encoding"] == "gzip"
    assert b"things_total 42.0" in gzip.decompress(body)
    _, fields, _ = await get(address, "/metrics", "Accept-Encoding: identity\r\n")
    assert "content-encoding" not in fields


async def test_health_and_readiness(address, node):
    assert await get(address, "/readyz") == (200, *(await get(address, "/readyz"))[1:])
    node.ready = (False, "draining")
    status, _, body = await get(address, "/readyz")
    assert (status, body) == (503, b"draining\n")
    assert (await get(address, "/healthz"))[0] == 200


async def test_failing_check_is_an_error_of_the_server_that_tells_nothing(address, node, caplog):
    node.ready = RuntimeError("secret")
    status, _, body = await get(address, "/readyz")
    assert status == 500
    assert b"secret" not in body
    assert "secret" in caplog.text


async def test_head_gets_the_head_only(address):
    status, fields, body = await get(address, "/metrics", method="HEAD")
    assert (status, body) == (200, b"")
    assert int(fields["content-length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/metrics", 405), ("GET", "/", 404), ("GET", "/metrics/x", 404)]
)
async def test_anything_else_is_refused(address, method, path, status):
    assert (await get(address, path, method=method))[0] == status


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET x HTTP/1.1\r\n\r\n",
        b"GET / HTTP/2\r\n\r\n",
        b"\x16\x03\x01\0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"\r\n\r\n",
        b"G\xe4T / HTTP/1.1 x\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_400(address, data):
    assert (await send(address, data)).startswith(b"HTTP/1.1 400 ")


async def test_request_without_end_is_refused(address):
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * (2 * MAX_HEAD_BYTES))
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
    writer.close()


async def test_silent_client_is_dropped_when_its_time_is_up(start):
    address = await start(timeout_s=0.05)
    assert await send(address, b"") == b""
    assert await send(address, b"GET /metrics HT") == b""


async def test_client_that_hangs_up_in_the_middle_is_no_news(address, caplog):
    _, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /met")
    writer.transport.abort()
    assert (await get(address, "/healthz"))[0] == 200
    assert [record for record in caplog.records if record.name.startswith("vcnode")] == []


async def test_client_that_does_not_read_is_dropped_when_its_time_is_up(node):
    for number in range(2000):
        Counter(f"filler_{number}", "x" * 2000, registry=node.registry)
    server = HttpServer(node.registry, node.ask, timeout_s=0.3)
    address = await server.start("127.0.0.1:0")
    deaf = socket.create_connection(address)
    deaf.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert (await get(address, "/healthz"))[0] == 200
    assert await server._tasks.join(timeout_s=10)
    deaf.close()
    await server.close()


async def test_hoarded_connections_do_not_add_up(start):
    address = await start(max_connections=2)
    hoard = [await asyncio.open_connection(*address) for _ in range(2)]
    with pytest.raises((OSError, ValueError, IndexError)):
        await get(address, "/healthz")
    for reader, writer in hoard:
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert (await reader.read()).endswith(b"ok\n")
        writer.close()
        await writer.wait_closed()
    assert (await get(address, "/healthz"))[0] == 200


async def test_close_drops_open_connections_and_can_be_repeated(node):
    server = HttpServer(node.registry, node.ask)
    await server.close()
    address = await server.start("127.0.0.1:0")
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /he")
    await get(address, "/healthz")
    await server.close()
    await server.close()
    with contextlib.suppress(ConnectionError):  # a reset or an end, as the kernel likes
        assert await reader.read() == b""
    writer.close()
    with pytest.raises(OSError, match=r"refused|Connect call failed"):
        await asyncio.open_connection(*address)


async def test_port_that_is_taken_is_said(address, node):
    with pytest.raises(UnavailableError, match="another node agent"):
        await HttpServer(node.registry, node.ask).start(f"127.0.0.1:{address[1]}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:2", ("::1", 2)), (":3", (None, 3)), ("host:0", ("host", 0))],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "9750", "host", "host:", "host:x", "host:-1", "host:65536", "host:²"])
def test_odd_addresses_are_refused(text):
    with pytest.raises(InvalidArgumentError, match="metrics_address"):
        parse_address(text)


def test_head_is_read_with_names_in_lower_case():
    request = parse_head(b"GET /a?b=c HTTP/1.0\r\nHost:x\r\nACCEPT:  a b \r\n\r\n")
    assert (request.method, request.path) == ("GET", "/a")
    assert request.headers == {"host": "x", "accept": "a b"}
