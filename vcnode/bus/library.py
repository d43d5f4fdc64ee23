"""nats-py as it must be for a process that runs for months next to strangers.

`SturdyClient` and `uncancelled` mend these behaviours of nats-py (read at 2.16.0, nats/aio/client.py):

- A message whose subject, reply subject or status line is not UTF-8 raises in ``_process_msg``; the read
  loop logs that and ends, and the connection is deaf from then on. Anybody who may publish can do this.
- An unexpected exception in ``_attempt_reconnect`` ends that task, and the client is RECONNECTING for ever.
- A ``tls=`` context is used only if the server asks for TLS, so credentials go out in the clear to whoever
  answers without asking.
- ``close`` of a client whose ``connect`` never got far enough fails an assertion.
- A connection that opens and then fails before the server is ready (a proxy in front of a dead server) is
  forgotten open, one for each attempt.
- What waits to be written when a connection breaks is written to the next one, behind a gap: what had been
  handed to the old socket is lost. For events, which are sent again in order, this would turn their order
  over (see ``perishable``).
- ``flush`` writes its PING ahead of what waits to be written, so it ends before the server has seen that: a
  subscription made before it need not stand yet. A reply to a ``flush`` that gave up raises in the read loop.
- ``_flush_pending`` swallows ``CancelledError``, so a cancelled publisher goes on (see `uncancelled`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import nats.aio.client
import nats.errors
from nats.aio.client import PING_PROTO, Client

from vcnode.bus import transport
from vcnode.bus.parser import FrugalParser

log = logging.getLogger(__name__)

transport.install()
nats.aio.client.DEFAULT_BUFFER_SIZE = 1 << 20
"""Bytes of one read, and half of those that wait to be read: with its own 32 KiB, a MiB takes 32 turns."""

T = TypeVar("T")


class TlsRefusedError(nats.errors.Error):
    """The server offers no TLS, though the settings ask for it."""

    def __str__(self) -> str:
        return "the server offers no TLS, and the settings ask for it"


class SturdyClient(Client):
    """A client that survives hostile messages and never connects without the TLS that was asked for.

    Args:
        require_tls: Whether a server without TLS is refused.
        perishable: Subjects that begin so are not kept over a reconnect; their publisher sends them again.
    """

    def __init__(self, *, require_tls: bool, perishable: str = "") -> None:
        super().__init__()
        self._ps = FrugalParser(self)
        self._require_tls = require_tls
        self._perishable = tuple(f"{verb} {perishable}".encode() for verb in ("PUB", "HPUB") if perishable)

    async def close(self) -> None:
        """Close; also what was never connected."""
        if self._flush_queue is not None:
            await super().close()

    async def publish_parts(self, subject: str, parts: Sequence[bytes | memoryview]) -> None:
        """As `publish` without headers, of a message in parts: it is copied once and not three times."""
        size = sum(map(len, parts))
        if not self.is_connected or size > self.max_payload:
            await self.publish(subject, b"".join(parts))  # which keeps it, or says why not
            return
        await self._send_command(b"".join((f"PUB {subject} {size}\r\n".encode(), *parts, b"\r\n")))
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception:
            log.warning("Dropped a malformed message on %r", bytes(subject[:128]), exc_info=True)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        # Behind what waits to be written, not ahead of it.
        self._pongs.append(asyncio.Future() if future is None else future)
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    async def _process_pong(self) -> None:
        if self._pongs and self._pongs[0].done():
            del self._pongs[0]  # whoever waited for it has given up
            self._pings_outstanding = 0
        else:
            await super()._process_pong()

    async def _attempt_reconnect(self) -> None:
        try:
            await super()._attempt_reconnect()
        except Exception:
            # Whoever owns this client hears it by closed_cb, and makes a new one.
            log.exception("Reconnecting failed in an unexpected way")
            await self.close()

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
        except BaseException:
            if self._transport is not None:
                self._transport.close()  # type: ignore[no-untyped-call]
            raise
        # Here, where the client has just become CONNECTED and nothing was written to the new socket yet: what
        # was there when the old one broke is in this list as well as what came since.
        forgotten = (*self._perishable, PING_PROTO)  # nobody waits for the reply to an old PING any more
        self._pending = [command for command in self._pending if not command.startswith(forgotten)]
        self._pending_data_size = sum(map(len, self._pending))

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Called before CONNECT, with its credentials, is sent. A server that merely allows TLS is upgraded,
        # as the reference client does (nats.go, checkForSecure).
        if initial_connection and self._require_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise TlsRefusedError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


async def uncancelled(work: Awaitable[T]) -> T:
    """Await a call of nats-py that may swallow a cancellation or replace it by an error; raise it after all.

    Raises:
        asyncio.CancelledError: This task was cancelled meanwhile.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0

    def cancelled() -> bool:
        return task is not None and task.cancelling() > before

    try:
        result = await work
    except Exception as exc:
        if cancelled():
            raise asyncio.CancelledError from exc
        raise
    if cancelled():
        raise asyncio.CancelledError
    return result
