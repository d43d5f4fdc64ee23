"""One logical connection to NATS that never gives up.

nats-py reconnects by itself as long as it can, with its subscriptions. Some errors end a client for good
(an expired user, a stale login, a protocol violation): then a new client is made here and set up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import nats.errors

from vcnode import aio
from vcnode.bus import options
from vcnode.bus.library import SturdyClient, uncancelled
from vcnode.errors import UnavailableError
from vcnode.models.subjects import Subjects
from vcnode.settings import NatsSettings

log = logging.getLogger(__name__)

SETUP_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 5.0
PUBLISH_TIMEOUT_S = 15.0
UNHURRIED_BYTES = 64 * 1024
"""With less than this in its buffer nats-py does not wait for the server when something is published."""

Setup = Callable[[SturdyClient], Awaitable[None]]


class ConnectionObserver(Protocol):
    """Hears of the connection's state."""

    def nats_connected(self, connected: bool) -> None:
        """The connection came up or went down."""
        ...


class Connection:
    """The node's connection.

    Args:
        settings: Where and how.
        name: Shown by the server.
        tasks: Where its one task runs.
        observer: Hears when the connection comes and goes.
    """

    def __init__(
        self, settings: NatsSettings, *, name: str, tasks: aio.Spawner, observer: ConnectionObserver
    ) -> None:
        self._settings = settings
        self._name = name
        self._tasks = tasks
        self._setups: list[Setup] = []
        self._listeners: list[Callable[[bool], None]] = [observer.nats_connected]
        self._client: SturdyClient | None = None
        self._up = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._last_complaint = ""

    @property
    def url(self) -> str:
        """The servers, without secrets."""
        return options.display(self._settings)

    @property
    def connected(self) -> bool:
        """Whether a server can be reached now."""
        return self._up.is_set()

    @property
    def client(self) -> SturdyClient:
        """The present client; it may be reconnecting.

        Raises:
            UnavailableError: There is none: NATS was never reached, or the client is being replaced.
        """
        if self._client is None:
            raise UnavailableError(f"There is no connection to NATS at {self.url}.")
        return self._client

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message that the server takes; 1 MiB while there is none."""
        return self._client.max_payload if self._client is not None else 1024 * 1024

    def on_client(self, setup: Setup) -> None:
        """Have *setup* called with every new client, before the connection counts as up.

        An error of NATS in *setup* closes the client, and a new one is made.
        """
        self._setups.append(setup)

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Have *listener* called whenever the connection comes up (True) or goes down."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Begin to connect, and go on for ever; returns at once.

        Raises:
            InvalidArgumentError: Settings with which no connection can ever be made.
        """
        with contextlib.suppress(options.SecretError):  # the file may come later
            options.connect_options(self._settings)
        self._task = self._tasks.spawn(self._supervise(), name="nats-connection")

    async def wait_connected(self) -> None:
        """Wait until the connection is up and set up."""
        await self._up.wait()

    @property
    def changed(self) -> asyncio.Event:
        """Set when the connection comes up or goes down the next time (a new event afterwards)."""
        return self._changed

    async def publish(self, subject: str, body: bytes, headers: dict[str, str], *, reply: str = "") -> None:
        """Publish; during an outage the message is kept for a while and sent afterwards.

        Raises:
            UnavailableError: No client, too much is waiting already, or the server does not read.
        """
        await self._hand_over(
            subject, lambda client: client.publish(subject, body, reply=reply, headers=headers)
        )

    async def publish_parts(self, subject: str, parts: Sequence[bytes | memoryview]) -> None:
        """As `publish`, of a message without headers, in parts."""
        await self._hand_over(subject, lambda client: client.publish_parts(subject, parts))

    async def _hand_over(self, subject: str, publish: Callable[[SturdyClient], Awaitable[None]]) -> None:
        client = self.client
        try:
            if client.is_connected and client.pending_data_size < UNHURRIED_BYTES:
                # nats-py only appends to its buffer: nothing to wait for, so no timer is needed.
                await publish(client)
                return
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                await uncancelled(publish(client))
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            raise UnavailableError(f"A message to {subject} could not be handed to NATS.") from exc

    async def close(self) -> None:
        """Send what waits, and close. Idempotent."""
        task, self._task = self._task, None
        if task is None:
            return
        while not task.done():
            task.cancel()  # again and again: nats-py swallows cancellations in some places
            await asyncio.wait({task}, timeout=1.0)

    async def _supervise(self) -> None:
        while True:
            closed = asyncio.Event()
            client = SturdyClient(
                require_tls=options.wants_tls(self._settings),
                perishable=Subjects(self._settings.prefix).event_prefix,
            )
            try:
                await self._connect(client, closed)
                await self._set_up(client)
                self._note_state(True)
                log.info("Connected to NATS", extra={"url": self.url})
                await closed.wait()
                log.warning("NATS ended the connection for good; making a new one")
            except Exception as exc:  # whatever it is, a node must not stay deaf because of it
                self._complain(exc)
            finally:
                self._client = None
                self._note_state(False)
                await self._close(client)
            await asyncio.sleep(options.retry_wait_s())

    async def _connect(self, client: SturdyClient, closed: asyncio.Event) -> None:
        async def on_error(exc: Exception) -> None:
            self._complain(exc)

        async def on_disconnected() -> None:
            self._note_state(False)

        async def on_reconnected() -> None:
            log.info("Reconnected to NATS")
            self._note_state(True)

        async def on_closed() -> None:
            closed.set()

        await uncancelled(
            client.connect(
                name=self._name,
                max_reconnect_attempts=-1,
                error_cb=on_error,
                disconnected_cb=on_disconnected,
                reconnected_cb=on_reconnected,
                closed_cb=on_closed,
                **options.connect_options(self._settings),
            )
        )

    async def _set_up(self, client: SturdyClient) -> None:
        self._client = client
        async with asyncio.timeout(SETUP_TIMEOUT_S):
            for setup in self._setups:
                await uncancelled(setup(client))
            await uncancelled(client.flush())

    async def _close(self, client: SturdyClient) -> None:
        async def close() -> None:
            if client.is_connected:
                with contextlib.suppress(nats.errors.Error, OSError):
                    await client.flush(timeout=CLOSE_TIMEOUT_S)  # type: ignore[arg-type]
            await client.close()

        try:
            await aio.finish(close(), timeout_s=2 * CLOSE_TIMEOUT_S)
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            log.warning("The connection to NATS did not close cleanly", exc_info=exc)

    def _note_state(self, up: bool) -> None:
        if up == self._up.is_set():
            return
        if up:
            self._last_complaint = ""
            self._up.set()
        else:
            self._up.clear()
        for listener in self._listeners:
            listener(up)
        self._changed.set()
        self._changed = asyncio.Event()

    def _complain(self, exc: Exception) -> None:
        """Log what is wrong, once per cause and outage rather than at each of endless attempts."""
        text = f"{type(exc).__name__}: {exc}"
        level = logging.DEBUG if text == self._last_complaint else logging.WARNING
        self._last_complaint = text
        log.log(level, "NATS: %s; trying again until it works", text, extra={"url": self.url})
