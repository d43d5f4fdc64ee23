"""From the outbox to JetStream: every event, in order, until it is acknowledged.

Events stay in the outbox while JetStream cannot be reached, has no such stream, or refuses. They are sent
in windows: a window is published without waiting, then acknowledged in order; what comes after the first
failure is sent again, and JetStream drops what it has already by ``Nats-Msg-Id``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy, StreamConfig

from vcnode import aio
from vcnode.bus.connection import Connection
from vcnode.bus.library import uncancelled
from vcnode.bus.streams import ensure_stream, storage
from vcnode.errors import VcnodeError
from vcnode.models.events import Event
from vcnode.models.subjects import Subjects
from vcnode.settings import NatsSettings

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.api import PubAck

log = logging.getLogger(__name__)

WINDOW = 64
"""Events on their way at once."""
ACK_TIMEOUT_S = 10.0
RETRY_FIRST_S, RETRY_MAX_S = 0.25, 10.0
DUPLICATE_WINDOW_S = 600.0
"""How long JetStream remembers message ids; longer outages are bridged by `EventPublisher._agree`."""
HEADER_RESERVE_BYTES = 4096
CONTENT_TYPE = "application/cloudevents+json"


class _ConnectionLost(Exception):  # noqa: N818 -- a signal, not a failure
    """Ends a session; the next one begins when the connection is back."""


class Outbox(Protocol):
    """What the publisher needs of `vcnode.pods.outbox.Outbox`."""

    async def unpublished(self, limit: int) -> Sequence[Event]:
        """The oldest events that wait, in order."""
        ...

    async def mark_published(self, sequence: int) -> None:
        """Note that everything up to and including *sequence* is acknowledged."""
        ...

    async def find(self, sequence: int) -> Event | None:
        """The event of this sequence, if it is still kept."""
        ...

    async def oldest(self) -> int:
        """Sequence of the oldest event that is still kept."""
        ...

    async def rewind(self, sequence: int, *, within_s: float, published_after: float = 0.0) -> int:
        """Have events after *sequence* published again."""
        ...

    async def continue_after(self, sequence: int, *, published: Collection[str]) -> int:
        """Give the events that wait the numbers after *sequence*, except for those *published*."""
        ...

    async def wait(self) -> None:
        """Wait until there is an event to publish."""
        ...


class EventObserver(Protocol):
    """Hears of published events."""

    def events_published(self, count: int) -> None:
        """JetStream acknowledged so many more events."""
        ...


class EventPublisher:
    """Publishes the outbox.

    Args:
        connection: To NATS.
        outbox: Where events wait.
        node_name: The node's name.
        subjects: Names under the prefix.
        settings: For a stream that does not exist yet; one that exists is never changed.
        observer: Hears of each window.
    """

    def __init__(
        self,
        connection: Connection,
        outbox: Outbox,
        *,
        node_name: str,
        subjects: Subjects,
        settings: NatsSettings,
        observer: EventObserver,
    ) -> None:
        self._connection = connection
        self._outbox = outbox
        self._node_name = node_name
        self._subjects = subjects
        self._settings = settings
        self._observer = observer
        self._last_complaint = ""
        self._retry_s = RETRY_FIRST_S
        self._session = aio.Interruptible()
        connection.on_change(self._on_change)

    async def run(self) -> None:
        """Publish for ever; ends by cancellation only."""
        while True:
            await self._connection.wait_connected()
            self._session = aio.Interruptible()
            try:
                async with self._session:
                    await self._publish_all()
            except _ConnectionLost:
                continue
            except Exception as exc:  # whatever it is: without this task no event would ever leave the node
                self._complain(exc)
                await self._pause(self._retry_s)
                self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)

    async def flush(self, *, timeout_s: float) -> bool:
        """Publish what waits now, at most *timeout_s* seconds; `run` must have ended. True: nothing waits.

        What is left is published after the next start.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while await self._outbox.unpublished(1):
                    await self._connection.wait_connected()
                    self._session = aio.Interruptible()
                    # A lost connection begins a window anew: what would follow in it has a gap before it.
                    with contextlib.suppress(_ConnectionLost):
                        async with self._session:
                            await self._publish_waiting(await self._open())
        except (nats.errors.Error, OSError, TimeoutError, VcnodeError) as exc:
            self._complain(exc)
        return not await self._outbox.unpublished(1)

    async def _publish_all(self) -> None:
        """Publish whatever comes, over the present connection."""
        js = await self._open()
        while True:
            await self._publish_waiting(js)
            self._last_complaint, self._retry_s = "", RETRY_FIRST_S
            await self._outbox.wait()

    async def _publish_waiting(self, js: JetStreamContext) -> None:
        while events := await self._outbox.unpublished(WINDOW):
            await self._publish(js, events)

    async def _open(self) -> JetStreamContext:
        """Make sure that the stream is there, and find out what it has of ours."""
        js = self._connection.client.jetstream(timeout=ACK_TIMEOUT_S)
        config = await ensure_stream(js, self._stream_config())
        await self._agree(js, config)
        return js

    def _stream_config(self) -> StreamConfig:
        return StreamConfig(
            name=self._subjects.event_stream,
            description="Status changes of all vcnode nodes",
            subjects=[self._subjects.every_event],
            retention=RetentionPolicy.LIMITS,
            storage=storage(self._settings),
            num_replicas=self._settings.stream_replicas,
            max_age=self._settings.stream_max_age_s,
            duplicate_window=min(DUPLICATE_WINDOW_S, self._settings.stream_max_age_s),
            allow_direct=True,
        )

    async def _agree(self, js: JetStreamContext, config: StreamConfig) -> None:
        """Bring the outbox in line with what the stream has of this node.

        The stream may know more (an acknowledgement was lost, in an outage longer than its memory of message
        ids) or less (it was made anew, or restored from an older copy): what it lost is published again, as
        far as the outbox still keeps it and the stream would still keep it.
        """
        within_s = config.max_age or math.inf
        try:
            last = await uncancelled(
                js.get_last_msg(
                    self._subjects.event_stream,
                    self._subjects.node_events(self._node_name),
                    # Asked for directly, what is asked for is part of the subject: permissions can see it.
                    direct=bool(config.allow_direct),
                )
            )
        except nats.js.errors.NotFoundError:
            await self._publish_again(0, within_s=within_s)
            return
        try:
            known = Event.model_validate_json(last.data or b"")
            sequence = int(known.sequence)
        except ValueError:
            log.warning("The newest message on this node's events is no event; cannot compare")
            return
        own = await self._outbox.find(sequence)
        if own is not None and own.message_id == known.message_id:
            await self._outbox.mark_published(sequence)
            await self._publish_again(sequence, within_s=within_s)
        elif sequence < await self._outbox.oldest():
            await self._publish_again(sequence, within_s=within_s)
        else:
            await self._continue(js, known, within_s)

    async def _continue(self, js: JetStreamContext, known: Event, within_s: float) -> None:
        """Follow on *known*, which the stream has of a database that this node has lost or put back.

        What this database has published since then is lost to the stream. Its own events get the numbers that
        follow, so that whoever reads the stream sees neither a number twice nor a gap.
        """
        await self._publish_again(0, within_s=within_s, published_after=known.time.timestamp())
        there = await self._published_ids(js)
        count = await self._outbox.continue_after(int(known.sequence), published=there)
        if count:
            log.warning(
                "JetStream has events up to %s of an earlier database; %d events go on from there",
                known.sequence,
                count,
            )

    async def _published_ids(self, js: JetStreamContext) -> frozenset[str]:
        """Message ids of all events of this node that the stream has, whatever clocks said meanwhile."""
        found = set()
        stream, name = self._subjects.event_stream, self._subjects.published_consumer(self._node_name)
        inbox = self._connection.client.new_inbox()
        sub = await uncancelled(self._connection.client.subscribe(inbox))
        try:
            with contextlib.suppress(nats.js.errors.NotFoundError):
                await uncancelled(js.delete_consumer(stream, name))
            config = ConsumerConfig(
                name=name,
                deliver_subject=inbox,
                filter_subject=self._subjects.node_events(self._node_name),
                deliver_policy=DeliverPolicy.ALL,
                ack_policy=AckPolicy.NONE,
                headers_only=True,
                inactive_threshold=ACK_TIMEOUT_S,
            )
            info = await uncancelled(js.add_consumer(stream, config))
            left = (info.num_pending or 0) + (info.delivered.consumer_seq if info.delivered else 0)
            while left:
                msg = await uncancelled(sub.next_msg(timeout=ACK_TIMEOUT_S))
                found.add((msg.headers or {}).get("Nats-Msg-Id", ""))
                left = msg.metadata.num_pending
            await uncancelled(js.delete_consumer(stream, name))
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(sub.unsubscribe())
        return frozenset(found)

    async def _publish_again(self, sequence: int, *, within_s: float, published_after: float = 0.0) -> None:
        count = await self._outbox.rewind(sequence, within_s=within_s, published_after=published_after)
        if count:
            log.warning("JetStream has lost %d events after %d; publishing them again", count, sequence)

    async def _publish(self, js: JetStreamContext, events: Sequence[Event]) -> None:
        """Send a window and mark what is acknowledged, up to the first failure, which is raised."""
        acks: list[asyncio.Future[PubAck]] = []
        acknowledged: Event | None = None
        count = 0
        try:
            for event in events:
                acks.append(await self._send(js, event))  # noqa: PERF401 -- kept when a later one fails
            async with asyncio.timeout(ACK_TIMEOUT_S):
                for event, ack in zip(events, acks, strict=True):
                    await ack
                    acknowledged, count = event, count + 1
        finally:
            for ack in acks:
                _let_go(ack)
            if acknowledged is not None:
                await self._outbox.mark_published(int(acknowledged.sequence))
                self._observer.events_published(count)

    async def _send(self, js: JetStreamContext, event: Event) -> asyncio.Future[PubAck]:
        headers = {"Nats-Msg-Id": event.message_id, "Content-Type": CONTENT_TYPE}
        body = event_body(event, limit_bytes=self._connection.max_payload - HEADER_RESERVE_BYTES)
        return await uncancelled(
            js.publish_async(
                self._subjects.event(self._node_name, event),
                body,
                wait_stall=ACK_TIMEOUT_S,
                stream=self._subjects.event_stream,
                headers=headers,
            )
        )

    def _on_change(self, up: bool) -> None:
        """No answer comes over a connection that was lost: do not wait for it."""
        if not up:
            self._session.interrupt(_ConnectionLost())

    async def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; a change of the connection ends it early."""
        changed = self._connection.changed
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds * random.uniform(0.75, 1.25)):  # noqa: S311 -- spreading
                await changed.wait()

    def _complain(self, exc: Exception) -> None:
        """Log what is wrong, once per cause rather than at each of endless attempts."""
        text = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, nats.js.errors.ServiceUnavailableError):
            text = "the server has no JetStream, or none for this account; events wait until it has"
        level = logging.DEBUG if text == self._last_complaint else logging.WARNING
        self._last_complaint = text
        known = isinstance(exc, (nats.errors.Error, OSError, TimeoutError, VcnodeError))
        log.log(level, "Events cannot be published: %s", text, exc_info=None if known else exc)


def event_body(event: Event, *, limit_bytes: int) -> bytes:
    """The event as CloudEvents JSON; without its data where that exceeds what NATS takes.

    An event that can never be sent would hold up all that follow, and leaving it out would be a gap.
    """
    fields = {name: value for name, value in event.model_dump(mode="json").items() if value is not None}
    body = json.dumps(fields, separators=(",", ":")).encode()
    if len(body) <= limit_bytes:
        return body
    log.warning("Event %s of %d bytes is sent without its data", event.id, len(body))
    fields["data"] = {"oversized_bytes": len(body)}
    return json.dumps(fields, separators=(",", ":")).encode()


def _let_go(ack: asyncio.Future[PubAck]) -> None:
    """Free what nats-py keeps for an acknowledgement, whether or not somebody waited for it."""
    if not ack.cancel() and not ack.cancelled():
        ack.exception()  # counts as looked at
