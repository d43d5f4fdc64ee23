"""Metrics and health over HTTP: ``/metrics``, ``/healthz``, ``/readyz``. GET and HEAD, one request each.

A server for three fixed pages needs no framework; what it needs is bounds, since anybody who reaches the
port may talk to it: connections, bytes of a request, and seconds of a whole exchange are limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from vcnode.aio import Tasks
from vcnode.errors import InvalidArgumentError, UnavailableError

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 8192
MAX_CONNECTIONS = 32
EXCHANGE_TIMEOUT_S = 10.0

Ready = Callable[[], tuple[bool, str]]
"""Says whether the node takes commands, and why not."""


@dataclass(frozen=True, slots=True)
class Request:
    """The head of a request."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name; of a repeated one, the last."""


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer."""

    status: http.HTTPStatus
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def text(cls, status: http.HTTPStatus, text: str) -> Response:
        """One line of plain text."""
        return cls(status, f"{text}\n".encode(), {"Content-Type": "text/plain; charset=utf-8"})

    def encode(self, *, with_body: bool) -> bytes:
        """The bytes to send."""
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        lines += [f"Content-Length: {len(self.body)}", "Connection: close", "", ""]
        return "\r\n".join(lines).encode("latin-1") + (self.body if with_body else b"")


def parse_head(head: bytes) -> Request:
    """Read the head of a request, up to and with its empty line.

    Raises:
        ValueError: It is not HTTP/1.
    """
    first, *rest = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if not version.startswith("HTTP/1.") or not method.isalpha() or not target.startswith("/"):
        raise ValueError("not an HTTP/1 request")
    headers = {}
    for line in rest:
        if line:
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError("not a header")
            headers[name.strip().lower()] = value.strip()
    return Request(method, target.partition("?")[0], headers)


def parse_address(address: str) -> tuple[str | None, int]:
    """Split ``host:port``, ``[v6]:port`` or ``:port`` (all interfaces: None).

    Raises:
        InvalidArgumentError: It is none of these.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidArgumentError.field(
            "metrics_address", f"{address!r} is not host:port, such as 127.0.0.1:9750"
        )
    return host.removeprefix("[").removesuffix("]") or None, int(port)


class HttpServer:
    """Serves the three pages from `start` to `close`, once.

    Args:
        registry: Metrics to show.
        ready: Asked at each ``/readyz``.
        prepare: Awaited before metrics are put together; bounds its own time.
        max_connections: Connections at once; more are closed unheard.
        timeout_s: Seconds for one whole exchange.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        ready: Ready,
        *,
        prepare: Callable[[], Awaitable[None]] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        timeout_s: float = EXCHANGE_TIMEOUT_S,
    ) -> None:
        self._registry = registry
        self._ready = ready
        self._prepare = prepare
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._tasks = Tasks()
        self._server: asyncio.Server | None = None

    async def start(self, address: str) -> tuple[str, int]:
        """Listen on *address* (see `parse_address`; port 0 takes a free one); returns host and port.

        Raises:
            InvalidArgumentError: *address* cannot be read.
            UnavailableError: It cannot be listened on.
        """
        host, port = parse_address(address)
        try:
            self._server = await asyncio.start_server(self._accept, host, port, limit=MAX_HEAD_BYTES)
        except OSError as exc:
            raise UnavailableError(
                f"Cannot listen on {address} for metrics: is another node agent running? "
                "Choose another metrics_address, or an empty one to do without.",
                address=address,
            ) from exc
        name = self._server.sockets[0].getsockname()
        return str(name[0]), int(name[1])

    async def close(self) -> None:
        """Stop listening and drop all connections. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        await self._tasks.close()
        await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection may have been accepted just before the server closed, and be handed over after it.
        if self._server is None or self._tasks.count >= self._max_connections:
            writer.transport.abort()
            return
        self._tasks.spawn(self._exchange(reader, writer), name="http exchange")

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # What the peer does wrong, or leaves undone, is no news.
            with contextlib.suppress(OSError, EOFError):
                async with asyncio.timeout(self._timeout_s):
                    writer.write(await self._answer(reader))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            request = parse_head(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError:
            status = http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return Response.text(status, "The request is too large.").encode(with_body=True)
        except ValueError:
            status = http.HTTPStatus.BAD_REQUEST
            return Response.text(status, "This is not an HTTP request.").encode(with_body=True)
        try:
            response = await self._respond(request)
        except Exception:
            log.exception("Answering %s failed", request.path)
            response = Response.text(http.HTTPStatus.INTERNAL_SERVER_ERROR, "Failed; see the node's log.")
        return response.encode(with_body=request.method != "HEAD")

    async def _respond(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            return Response(http.HTTPStatus.METHOD_NOT_ALLOWED, b"", {"Allow": "GET, HEAD"})
        match request.path:
            case "/metrics":
                if self._prepare is not None:
                    await self._prepare()
                return self._metrics(request)
            case "/healthz":
                # That it answers is the answer: the event loop turns.
                return Response.text(http.HTTPStatus.OK, "ok")
            case "/readyz":
                ready, text = self._ready()
                return Response.text(
                    http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE, text
                )
        return Response.text(http.HTTPStatus.NOT_FOUND, "There are /metrics, /healthz and /readyz.")

    def _metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        body, headers = encode(self._registry), {"Content-Type": content_type}
        offered = [
            name.partition(";")[0].strip() for name in request.headers.get("accept-encoding", "").split(",")
        ]
        if "gzip" in offered:
            body = gzip.compress(body, compresslevel=1)
            headers["Content-Encoding"] = "gzip"
        return Response(http.HTTPStatus.OK, body, headers)
