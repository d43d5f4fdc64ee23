"""What a port-forward session is for: connections to ports inside a pod, many in one session.

The client opens connection ``c`` (4, 5, …) by a message ``{"open": c, "port": n}``, and may send on its
stream ``2c`` at once. The answer is ``{"opened": c}`` or ``{"refused": c, "code": …, "message": …}``; what
comes from the port is stream ``2c + 1``. Either direction ends by itself: connections can be half closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.drivers.base import GuestConnection, GuestSession
from vcnode.errors import FailedPreconditionError, ResourceExhaustedError, VcnodeError
from vcnode.pods.sessions import LiveSession
from vcnode.sessions.carrier import Carrier, OverError
from vcnode.sessions.frames import FIRST_CONNECTION

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
"""Connections of one session at once."""
LAST_CONNECTION = (1 << 31) - 1
CONNECT_LIMIT_S = 15.0
CLOSE_LIMIT_S = 10.0


class ForwardWork:
    """Connects and carries.

    Args:
        guest: Finds the pod's guest, anew for each connection: its session may have been lost and made again.
        tasks: Runs the connections.
    """

    def __init__(self, guest: Callable[[], GuestSession], tasks: Spawner) -> None:
        self.streams: tuple[int, ...] = ()
        self._guest = guest
        self._tasks = tasks
        self._running: set[asyncio.Task[None]] = set()
        self._next = FIRST_CONNECTION

    async def run(self, session: LiveSession) -> None:
        """See `Work.run`. It ends when a connection is asked for and the pod is no more."""
        while (message := await session.carrier.message()) is not None:
            match message:
                case {"open": int(number), "port": int(port)} if number == self._next <= LAST_CONNECTION:
                    self._next += 1
                    with contextlib.suppress(FailedPreconditionError):  # may pass: it is refused
                        self._guest()
                    self._open(session.carrier, number, port)
                case {"close": True}:
                    return
                case _:
                    log.info("A client asks for what a port-forward cannot do")

    def _open(self, carrier: Carrier, number: int, port: int) -> None:
        carrier.open(2 * number)
        carrier.open(2 * number + 1)
        task = self._tasks.spawn(self._serve(carrier, number, port), name=f"connection to port {port}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, carrier: Carrier, number: int, port: int) -> None:
        up, down = 2 * number, 2 * number + 1
        try:
            try:
                if len(self._running) > MAX_CONNECTIONS:
                    raise ResourceExhaustedError(f"The session has {MAX_CONNECTIONS} connections open.")
                if not 0 < port < 1 << 16:
                    raise ResourceExhaustedError(f"{port} is no port.")
                connection = await self._guest().connect_port(port, timeout_s=CONNECT_LIMIT_S)
            except VcnodeError as exc:
                await carrier.send_message({"refused": number, "code": exc.code, "message": exc.message})
                return
            try:
                await carrier.send_message({"opened": number})
                await self._carry(carrier, connection, up, down)
            finally:
                await aio.finish(connection.close(), timeout_s=CLOSE_LIMIT_S)
        except (OverError, VcnodeError) as exc:
            log.debug("A connection to port %d was cut", port, exc_info=exc)
        finally:
            carrier.refuse(up)
            carrier.end(down)

    async def _carry(self, carrier: Carrier, connection: GuestConnection, up: int, down: int) -> None:
        async def send() -> None:
            try:
                while data := await carrier.read(up):
                    await connection.write(bytes(data))
                await connection.close_write()
            except VcnodeError as exc:
                log.debug("A connection was cut", exc_info=exc)

        sending = self._tasks.spawn(send(), name="connection to the pod")
        try:
            async for data in connection.received():
                await carrier.write(down, data)
            carrier.end(down)
            await asyncio.wait({sending})
        finally:
            sending.cancel()

    async def close(self) -> None:
        """See `Work.close`."""
        running = set(self._running)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
