"""Events as an async iterator, from JetStream, or live only where the stream does not exist yet.

The consumer is an ordered one in the sense of NATS ADR-17: made without acknowledgements, watched by
heartbeats and sequence, and made anew behind the last event whenever anything is missing. nats-py has one
of its own, whose checks run inside its read loop; here the reader itself does them, so what it has not
taken yet holds the server back (flow control), and nothing is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Literal

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from pydantic import ValidationError

from vcnode.bus.library import uncancelled
from vcnode.errors import UnavailableError
from vcnode.models.events import Event
from vcnode.models.subjects import Subjects

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription
    from nats.js import JetStreamContext

    from vcnode.client.requests import Requester

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""The server speaks at least this often; two and a half times as long without a word is a lost consumer."""
INACTIVE_S = 30.0
"""After so long without its reader the server forgets a consumer."""
API_TIMEOUT_S = 5.0
RETRY_S = 0.5
QUEUE_SIZE = 1024
"""Messages taken from the connection ahead of the reader."""


@dataclass(slots=True)
class Sequences:
    """The per-node sequence numbers seen so far."""

    last: dict[str, tuple[int, datetime]] = field(default_factory=dict)

    def note(self, event: Event) -> int | None:
        """Note *event*.

        Returns:
            How many events of its node are missing before it (0 is normal); None if it was seen before.
        """
        sequence = int(event.sequence)
        known = self.last.get(event.source)
        if known is not None and sequence <= known[0] and event.time <= known[1]:
            return None
        self.last[event.source] = (sequence, event.time)
        # A lower number with a later time: the node began anew with an empty state directory.
        return 0 if known is None or sequence <= known[0] else sequence - known[0] - 1


class EventStream:
    """Events; enter it with ``async with``, iterate with ``async for``. Made by ``Client.events``.

    Once entered, no event that happens afterwards is missed while the stream holds it. Where there is no
    stream (no JetStream, or no node has ever connected) events come live, and what happens during a lost
    connection is missed; ``missed`` counts it as far as it can be known.
    """

    def __init__(
        self,
        requester: Requester,
        subjects: Subjects,
        filters: tuple[str, ...],
        *,
        since: Literal["now", "all"] | int | datetime,
        follow: bool,
        complete: bool,
    ) -> None:
        self._requester = requester
        self._subjects = subjects
        self._filters = filters
        self._since = since
        self._follow = follow
        self._complete = complete
        self._queue: asyncio.Queue[Msg | None] = asyncio.Queue(QUEUE_SIZE)
        self._stale = False
        self._unwatch: Callable[[], None] | None = None
        self._subscriptions: list[Subscription] = []
        self._sequences = Sequences()
        self._live_only = False
        self._expected = 1
        self._start: int | datetime | None = None
        self._stream_was_absent = False
        self._position: int | None = None
        self._done = False
        self._missed = 0

    @property
    def position(self) -> int | None:
        """Position in the stream of the last event given; None before the first, and without a stream."""
        return self._position

    @property
    def missed(self) -> int:
        """Events known to be missing; counted only where no filter by pod or kind leaves some out."""
        return self._missed

    @property
    def live_only(self) -> bool:
        """True where there is no stream to read from."""
        return self._live_only

    async def __aenter__(self) -> EventStream:
        self._unwatch = self._requester.watch(self._on_connection)
        try:
            await self._open()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._unwatch is not None:
            self._unwatch()
        await self._unsubscribe()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            StopAsyncIteration: Without ``follow``: the stream holds no more.
            UnavailableError: The connection was closed.
        """
        while not self._done:
            msg = await self._next_message()
            if msg is not None and (event := self._take(msg)) is not None:
                return event
        raise StopAsyncIteration

    def _on_connection(self) -> None:
        """The connection was lost and is back, or is closed: have the reader look."""
        self._stale = True
        if not self._queue.full():
            self._queue.put_nowait(None)

    async def _next_message(self) -> Msg | None:
        """The next message; None after the consumer had to be made anew."""
        try:
            async with asyncio.timeout(None if self._live_only else 2.5 * HEARTBEAT_S):
                msg = await self._queue.get()
        except TimeoutError:
            await self._reopen("the server fell silent")
            return None
        if msg is None or self._stale:
            await self._reopen("the connection was lost")
            return None
        if self._live_only:
            return msg
        if (msg.headers or {}).get("Status") is not None:
            await self._on_control(msg)
            return None
        metadata = msg.metadata
        if metadata.sequence.consumer != self._expected:
            await self._reopen("a message is missing")
            return None
        self._expected += 1
        self._position = metadata.sequence.stream
        if not self._follow and metadata.num_pending == 0:
            self._done = True
        return msg

    def _take(self, msg: Msg) -> Event | None:
        try:
            event = Event.model_validate_json(msg.data)
            missing = self._sequences.note(event)
        except (ValidationError, ValueError):
            log.warning("Something that is no event was published on %s", msg.subject)
            return None
        if missing is None:
            return None
        if missing and self._complete:
            self._missed += missing
            log.warning("%d events of %s are missing before %s", missing, event.source, event.id)
        return event

    async def _on_control(self, msg: Msg) -> None:
        """Answer flow control, in its turn: everything before it has been taken by the reader.

        Source: NATS ADR-9 (idle heartbeats: status 100 without reply) and flow control (100 with reply, or
        named in the header of a heartbeat when a request for it was lost).
        """
        subject = msg.reply or (msg.headers or {}).get("Nats-Consumer-Stalled")
        if subject:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(self._requester.client.publish(subject))
            return
        last = (msg.headers or {}).get("Nats-Last-Consumer", "")
        if last.isdigit() and int(last) != self._expected - 1:
            await self._reopen("a message is missing")

    async def _open(self) -> None:
        """Subscribe, from the stream if there is one."""
        js = self._requester.client.jetstream(timeout=API_TIMEOUT_S)
        try:
            info = await uncancelled(js.stream_info(self._subjects.event_stream))
        except (nats.js.errors.NotFoundError, nats.js.errors.ServiceUnavailableError) as exc:
            self._stream_was_absent = isinstance(exc, nats.js.errors.NotFoundError)
            await self._open_live()
            return
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            raise UnavailableError("The event stream cannot be reached.") from exc
        self._start = self._starting_point(info.state.last_seq)
        self._live_only = False
        try:
            await self._consume(js)
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            await self._unsubscribe()
            raise UnavailableError("The event stream cannot be read.") from exc

    def _starting_point(self, last: int) -> int | datetime:
        """Where to read from, in a stream whose last message is at *last*."""
        if self._position is not None:
            # A stream shorter than what was read has been made anew, or has lost its end.
            return self._position + 1 if last >= self._position else 1
        if self._stream_was_absent:
            return 1  # all that it holds has been published since
        if self._start is not None:
            return self._start
        if self._since == "now":
            return last + 1
        return 1 if self._since == "all" else self._since

    async def _consume(self, js: JetStreamContext) -> None:
        client = self._requester.client
        inbox = client.new_inbox()
        self._expected = 1
        self._queue = asyncio.Queue(QUEUE_SIZE)
        self._subscriptions = [await uncancelled(client.subscribe(inbox, cb=self._receiver(self._queue)))]
        by_time = isinstance(self._start, datetime)
        config = ConsumerConfig(
            deliver_subject=inbox,
            deliver_policy=DeliverPolicy.BY_START_TIME if by_time else DeliverPolicy.BY_START_SEQUENCE,
            opt_start_time=self._start if isinstance(self._start, datetime) else None,
            opt_start_seq=self._start if isinstance(self._start, int) else None,
            ack_policy=AckPolicy.NONE,
            max_deliver=1,
            filter_subject=self._filters[0] if len(self._filters) == 1 else None,
            filter_subjects=list(self._filters) if len(self._filters) > 1 else None,
            flow_control=True,
            idle_heartbeat=HEARTBEAT_S,
            inactive_threshold=INACTIVE_S,
            mem_storage=True,
            num_replicas=1,
        )
        info = await uncancelled(js.add_consumer(self._subjects.event_stream, config))
        if not self._follow and not info.num_pending and not (info.delivered and info.delivered.consumer_seq):
            self._done = True

    async def _open_live(self) -> None:
        """Without a stream: whatever passes by."""
        self._live_only = True
        if not self._follow:
            self._done = True
            return
        client = self._requester.client
        try:
            for subject in self._filters:
                receiver = self._receiver(self._queue)
                self._subscriptions.append(await uncancelled(client.subscribe(subject, cb=receiver)))
            await uncancelled(client.flush())
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            await self._unsubscribe()
            raise UnavailableError("Events cannot be subscribed to.") from exc

    def _receiver(self, queue: asyncio.Queue[Msg | None]) -> Callable[[Msg], Awaitable[None]]:
        async def receive(msg: Msg) -> None:
            await queue.put(msg)

        return receive

    async def _reopen(self, why: str) -> None:
        """Make the consumer anew behind the last event; tries until the connection is closed."""
        log.info("Reading the event stream anew: %s", why)
        while True:
            await self._unsubscribe()
            self._stale = False
            if self._requester.client.is_closed:
                raise UnavailableError("The connection to NATS was closed; make a new client.")
            try:
                await self._open()
            except UnavailableError as exc:
                log.debug("Events: %s", exc)
                await asyncio.sleep(RETRY_S)
            else:
                return

    async def _unsubscribe(self) -> None:
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(subscription.unsubscribe())
