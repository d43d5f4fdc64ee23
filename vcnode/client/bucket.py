"""A KV bucket as it is, and as it changes: a snapshot, then every change, without a gap.

A consumer without acknowledgements gives the last value of each key, then what comes after. Whenever
something may be missing (the connection was lost, a sequence number skipped, the server fell silent) it is
made anew, which gives the whole snapshot again: `Ready` then tells that keys not seen since are gone.

Source: NATS ADR-8 (KV), ADR-17 (ordered consumers), ADR-9 (idle heartbeats).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from vcnode.bus.library import uncancelled
from vcnode.errors import UnavailableError

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from vcnode.client.requests import Requester

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
SILENCE_S = 6.0
"""Seconds without so much as a heartbeat after which the server is held to have forgotten the consumer: in a
cluster it is lost with the server that had it."""
INACTIVE_S = 30.0
API_TIMEOUT_S = 5.0
RETRY_S = 0.5
QUEUE_SIZE = 65_536
"""Changes taken from the connection ahead of the reader; beyond, the snapshot is taken anew."""


@dataclass(frozen=True, slots=True)
class Put:
    """A key has this value."""

    key: str
    value: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """A key has no value any more."""

    key: str


@dataclass(frozen=True, slots=True)
class Begin:
    """A snapshot begins: what was known is to be compared with what comes now."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The snapshot is complete: keys that it did not name have no value."""


@dataclass(frozen=True, slots=True)
class Heard:
    """Nothing has changed up to now: the server said so."""


Change = Put | Gone | Begin | Ready | Heard


class BucketWatch:
    """Watches one bucket; iterate over `changes`, once."""

    def __init__(self, requester: Requester, bucket: str, keys: str = ">") -> None:
        self._requester = requester
        self._bucket = bucket
        self._prefix = f"$KV.{bucket}."
        self._keys = keys
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue()
        self._overrun = False

    async def changes(self) -> AsyncIterator[Change]:
        """Snapshot and changes, until the connection is closed.

        Raises:
            UnavailableError: The connection was closed.
        """
        unwatch = self._requester.watch(self._wake)
        try:
            while True:
                self._check_open()
                try:
                    async for change in self._session():
                        yield change
                except (nats.errors.Error, OSError, TimeoutError) as exc:
                    # Without the bucket nothing is known; the first node that connects makes it.
                    log.debug("Bucket %s cannot be read: %s", self._bucket, exc)
                    await asyncio.sleep(RETRY_S)
        finally:
            unwatch()

    def _check_open(self) -> None:
        if self._requester.client.is_closed:
            raise UnavailableError("The connection to NATS was closed; make a new client.")

    def _wake(self) -> None:
        """The connection was lost and is back, or is closed."""
        self._queue.put_nowait(None)

    async def _session(self) -> AsyncIterator[Change]:
        """One snapshot and what follows, until something may be missing."""
        client = self._requester.client
        self._queue, self._overrun = asyncio.Queue(), False
        inbox = client.new_inbox()
        subscription: Subscription = await uncancelled(
            client.subscribe(inbox, cb=self._receiver(self._queue))
        )
        try:
            info = await uncancelled(
                client.jetstream(timeout=API_TIMEOUT_S).add_consumer(
                    f"KV_{self._bucket}", self._config(inbox)
                )
            )
            sent = info.delivered.consumer_seq if info.delivered else 0
            in_snapshot = sent + (info.num_pending or 0)
            yield Begin()
            if not in_snapshot:
                yield Ready()
            number = 0
            while (msg := await self._next()) is not None:
                if (msg.headers or {}).get("Status") is not None:
                    yield Heard()  # a heartbeat: it comes after all that was to be delivered
                    continue
                number += 1
                if msg.metadata.sequence.consumer != number:
                    return
                yield self._change(msg)
                if number == in_snapshot:
                    yield Ready()
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(subscription.unsubscribe())

    def _config(self, inbox: str) -> ConsumerConfig:
        return ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=AckPolicy.NONE,
            max_deliver=1,
            filter_subject=f"{self._prefix}{self._keys}",
            idle_heartbeat=HEARTBEAT_S,
            inactive_threshold=INACTIVE_S,
            mem_storage=True,
            num_replicas=1,
        )

    async def _next(self) -> Msg | None:
        """The next message; None when the snapshot must be taken anew."""
        if self._overrun:
            return None
        try:
            async with asyncio.timeout(SILENCE_S):
                return await self._queue.get()
        except TimeoutError:
            return None

    def _change(self, msg: Msg) -> Change:
        key = msg.subject.removeprefix(self._prefix)
        return Gone(key) if "KV-Operation" in (msg.headers or {}) else Put(key, msg.data)

    def _receiver(self, queue: asyncio.Queue[Msg | None]) -> Callable[[Msg], Awaitable[None]]:
        async def receive(msg: Msg) -> None:
            if queue.qsize() >= QUEUE_SIZE:
                self._overrun = True
                return
            queue.put_nowait(msg)

        return receive
