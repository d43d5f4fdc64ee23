"""Port-forward sessions: connections to ports inside a pod."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from vcnode.aio import Tasks
from vcnode.client.sessions import SessionClient
from vcnode.errors import VcnodeError, from_code
from vcnode.sessions.carrier import Carrier, OverError
from vcnode.sessions.frames import FIRST_CONNECTION

READ_BYTES = 64 * 1024


class PodConnection:
    """One TCP connection to a port inside a pod. What is not read holds up its sender, and nobody else."""

    def __init__(self, carrier: Carrier, number: int) -> None:
        self._carrier = carrier
        self._up, self._down = 2 * number, 2 * number + 1

    async def read(self) -> bytes:
        """The next bytes; empty at the end."""
        return bytes(await self._carrier.read(self._down))

    async def write(self, data: bytes) -> None:
        """Send; waits for room. Raises ConnectionResetError when the other side takes no more."""
        try:
            await self._carrier.write(self._up, data)
        except OverError as exc:
            raise ConnectionResetError("The pod's side has closed the connection.") from exc

    def close_write(self) -> None:
        """Send no more; what comes can still be read. Idempotent."""
        self._carrier.end(self._up)

    def close(self) -> None:
        """Close in both directions. Idempotent."""
        self._carrier.end(self._up)
        self._carrier.refuse(self._down)


class Forward(SessionClient):
    """A session with a pod's ports; enter it with ``async with``."""

    _next = FIRST_CONNECTION

    def _on_node_message(self, message: dict[str, Any]) -> None:
        match message:
            case {"opened": int(number)}:
                self._settle(number, None)
            case {"refused": int(number), "code": str(code), "message": str(text)}:
                self._settle(number, from_code(code, text, {}))
            case {"error": {"code": str(code), "message": str(text)}}:
                self._error = from_code(code, text, {})

    def _settle(self, number: int, error: VcnodeError | None) -> None:
        waiting = self._opening_connections.pop(number, None)
        if waiting is not None and not waiting.done():
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(error)

    def _on_over(self) -> None:
        for number in list(self._opening_connections):
            self._settle(number, self._failure())

    async def connect(self, port: int) -> PodConnection:
        """Connect to a port of the pod's loopback interface.

        Raises:
            FailedPreconditionError: Nobody listens there.
            VcnodeError: The session is over, or has as many connections as it may.
        """
        number, self._next = self._next, self._next + 1
        self._carrier.open(2 * number)
        self._carrier.open(2 * number + 1)
        connection = PodConnection(self._carrier, number)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._opening_connections[number] = waiting
        try:
            await self._carrier.send_message({"open": number, "port": port})
            await waiting
        except OverError as exc:
            raise self._failure() from exc
        except BaseException:
            connection.close()
            raise
        finally:
            self._opening_connections.pop(number, None)
        return connection

    @contextlib.asynccontextmanager
    async def listen(self, port: int, *, host: str = "127.0.0.1", local_port: int = 0) -> AsyncIterator[int]:
        """Listen on this machine and forward each connection to *port* of the pod; gives the local port.

        Raises:
            OSError: The local port cannot be listened on.
        """
        async with Tasks() as tasks:

            def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                tasks.spawn(self._carry(reader, writer, port), name=f"forward to port {port}")

            server = await asyncio.start_server(serve, host, local_port)
            try:
                yield server.sockets[0].getsockname()[1]
            finally:
                server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        try:
            connection = await self.connect(port)
        except VcnodeError:
            writer.transport.abort()
            return
        async with Tasks() as tasks:
            sending = tasks.spawn(_send(reader, connection), name="forward: to the pod")
            try:
                with contextlib.suppress(OSError):
                    while data := await connection.read():
                        writer.write(data)
                        await writer.drain()
                    if writer.can_write_eof():
                        writer.write_eof()
                    await asyncio.wait({sending})
            finally:
                connection.close()
                writer.close()


async def _send(reader: asyncio.StreamReader, connection: PodConnection) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(READ_BYTES):
            await connection.write(data)
        connection.close_write()
