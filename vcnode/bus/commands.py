"""Durable commands: a JetStream work queue that keeps them until their outcome is known.

::

    stream -> pull -> received (SQLite) -> one after another per object -> dispatch -> outcome event -> ack

Commands about one pod run in the order of the stream, those about different ones at the same time. The
consumer is made anew whenever the node connects, so that JetStream delivers everything that is not
acknowledged at once and in order; what this process still holds is recognised by its place in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, RetentionPolicy, StreamConfig

from vcnode import aio
from vcnode.bus.connection import Connection
from vcnode.bus.library import uncancelled
from vcnode.bus.streams import ensure_stream, storage
from vcnode.errors import InvalidArgumentError, NodeError, VcnodeError
from vcnode.handlers.dispatch import Dispatcher
from vcnode.handlers.outcome import Outcome
from vcnode.models import wire
from vcnode.models.audit import AuditRecord
from vcnode.models.base import JsonObject
from vcnode.models.commands import COMMANDS
from vcnode.models.events import EventKind
from vcnode.models.subjects import Subjects
from vcnode.pods.received import Receipt
from vcnode.pods.stored import Stored
from vcnode.pods.trail import concluded
from vcnode.settings import NatsSettings

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription
    from nats.js import JetStreamContext

log = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 64
"""Commands held at once, waiting ones included."""
MAX_RUNNING = 16
"""Commands carried out at once; the rest of the node's places is for those who wait for a reply."""
MAX_DELIVERIES = 5
"""A command that has taken so many node agents down with it is rejected."""
MAX_ATTEMPTS = 8
"""Attempts at a command that fails in a way that may pass; then its failure is the outcome."""
ATTEMPT_FIRST_S, ATTEMPT_MAX_S = 0.25, 15.0
ACK_WAIT_S = 30.0
"""JetStream delivers a command again after so many seconds without a sign of life."""
PULL_S, HEARTBEAT_S = 60.0, 10.0
API_TIMEOUT_S = 10.0
RETRY_FIRST_S, RETRY_MAX_S = 0.25, 10.0
CLOSE_TIMEOUT_S = 60.0
"""How long cancelled commands may take for their undo."""
MAX_REPLY_BYTES = 256 * 1024
"""Largest reply that an outcome event carries."""

_ACK, _IN_PROGRESS = b"+ACK", b"+WPI"


class _ConnectionLost(Exception):  # noqa: N818 -- a signal, not a failure
    """Ends a session; the next one begins when the connection is back."""


class _Stopping(Exception):  # noqa: N818 -- a signal, not a failure
    """Ends the last session."""


class Received(Protocol):
    """What is needed of `vcnode.pods.received.Received`."""

    async def receive(self, message: str) -> Receipt:
        """Count a delivery."""
        ...

    async def give_back(self, message: str) -> None:
        """Take back the last delivery of *message*: it was undone."""
        ...

    async def conclude(
        self,
        message: str,
        kind: EventKind,
        command_id: str,
        data: JsonObject,
        audit: AuditRecord | None = None,
        *,
        traceparent: str | None = None,
    ) -> None:
        """Tell the outcome, once."""
        ...


@dataclass(slots=True)
class _Held:
    """A command that was received and is not acknowledged."""

    message: str
    """Names the message for ever: its place in the stream and the time at which it got there."""
    verb: str
    headers: dict[str, str]
    body: bytes
    reply: str
    """Where it is acknowledged; a later delivery brings another."""
    counted: bool = False
    """Whether this delivery stands among those that were begun."""


class DurableCommands:
    """Takes commands from the work queue.

    Args:
        connection: To NATS.
        dispatcher: Runs the commands, as it does those that come by request.
        received: Remembers what was received.
        node_name: The node's name.
        subjects: Names under the prefix.
        settings: For a stream that does not exist yet.
    """

    def __init__(
        self,
        connection: Connection,
        dispatcher: Dispatcher,
        received: Received,
        *,
        node_name: str,
        subjects: Subjects,
        settings: NatsSettings,
    ) -> None:
        self._connection = connection
        self._dispatcher = dispatcher
        self._received = received
        self._node_name = node_name
        self._subjects = subjects
        self._settings = settings
        self._tasks = aio.Tasks()
        self._held: dict[str, _Held] = {}
        self._queues: dict[str, deque[_Held]] = {}
        self._places = asyncio.Semaphore(MAX_RUNNING)
        self._room = asyncio.Event()
        self._room.set()
        self._stopping = asyncio.Event()
        self._session = aio.Interruptible()
        self._retry_s = RETRY_FIRST_S
        self._last_complaint = ""
        connection.on_change(self._on_change)

    async def run(self) -> None:
        """Take commands until `stop_intake` is called."""
        self._tasks.spawn(self._show_life(), name="command-progress")
        while not self._stopping.is_set():
            await self._connection.wait_connected()
            self._session = aio.Interruptible()
            if self._stopping.is_set():
                return
            try:
                async with self._session:
                    await self._take()
            except (_ConnectionLost, _Stopping):
                continue
            except Exception as exc:  # whatever it is: without this task no durable command would ever run
                self._complain(exc)
                await self._stops_within(self._retry_s)
                self._retry_s = min(2 * self._retry_s, RETRY_MAX_S)

    def stop_intake(self) -> None:
        """Take no more; what is not running yet stays in the stream for the next start."""
        self._stopping.set()
        self._session.interrupt(_Stopping())

    async def drain(self, *, timeout_s: float) -> bool:
        """Take no more, and let what runs finish; what has not after *timeout_s* seconds is undone.

        Undone commands run again after the next start.

        Returns:
            Whether every command ended by itself.
        """
        self.stop_intake()
        finished = await self._tasks.join(timeout_s=timeout_s)
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await self._tasks.close()
        return finished

    async def close(self) -> None:
        """Stop at once, cancelling what runs. Idempotent."""
        self.stop_intake()
        await self._tasks.close()

    # ---- taking --------------------------------------------------------------------------------------

    async def _take(self) -> None:
        """Receive commands over the present connection, as there is room for them."""
        client = self._connection.client
        js = client.jetstream(timeout=API_TIMEOUT_S)
        await ensure_stream(js, self._stream_config())
        await self._make_consumer(js)
        inbox = client.new_inbox()
        sub = await uncancelled(client.subscribe(inbox))
        try:
            while True:
                await self._room.wait()
                await self._pull(sub, inbox, WINDOW - len(self._held))
                self._last_complaint, self._retry_s = "", RETRY_FIRST_S
        finally:
            with contextlib.suppress(nats.errors.Error, OSError):
                await uncancelled(sub.unsubscribe())

    def _stream_config(self) -> StreamConfig:
        return StreamConfig(
            name=self._subjects.command_stream,
            description="Commands to vcnode nodes, kept until they are done",
            subjects=[self._subjects.every_command],
            retention=RetentionPolicy.WORK_QUEUE,
            storage=storage(self._settings),
            num_replicas=self._settings.stream_replicas,
            max_age=self._settings.command_max_age_s,
            duplicate_window=min(120.0, self._settings.command_max_age_s),
        )

    async def _make_consumer(self, js: JetStreamContext) -> None:
        """Make the consumer anew: all that is unacknowledged comes again, before anything newer."""
        stream = self._subjects.command_stream
        with contextlib.suppress(nats.js.errors.NotFoundError):
            await uncancelled(js.delete_consumer(stream, self._node_name))
        config = ConsumerConfig(
            name=self._node_name,  # with it, the filter is part of the API's subject: permissions can see it
            durable_name=self._node_name,
            description=f"Durable commands to node {self._node_name}",
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_ack_pending=2 * WINDOW,
            max_deliver=-1,  # bounded here: JetStream would keep such a message for ever, and tell nobody
            filter_subject=self._subjects.node_commands(self._node_name),
        )
        await uncancelled(js.add_consumer(stream, config))

    async def _pull(self, sub: Subscription, inbox: str, batch: int) -> None:
        """Ask for *batch* commands and take them as they come; ends when they are there or time is up.

        Source: NATS ADR-37 (pull requests, their heartbeats and status messages).
        """
        ask = {"batch": batch, "expires": int(PULL_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._subjects.command_stream}.{self._node_name}"
        await self._connection.publish(subject, json.dumps(ask).encode(), {}, reply=inbox)
        while batch:
            msg = await uncancelled(sub.next_msg(timeout=3 * HEARTBEAT_S))
            status = (msg.headers or {}).get("Status")
            if status is None:
                self._accept(msg)
                batch -= 1
            elif status in ("404", "408"):
                return
            elif status != "100":
                raise NodeError(f"The queue of durable commands ended a request with status {status}.")

    def _accept(self, msg: Msg) -> None:
        """Put one message into the queue of the object that it is about."""
        message = name_of(msg)
        if (known := self._held.get(message)) is not None:
            known.reply = msg.reply
            return
        headers = dict(msg.headers or {})
        if wire.COMMAND_ID.lower() not in (name.lower() for name in headers):
            headers[wire.COMMAND_ID] = f"cmd-{message}"
        held = _Held(
            message, self._subjects.parse_cmd(self._node_name, msg.subject), headers, msg.data, msg.reply
        )
        if self._stopping.is_set():
            return
        self._held[message] = held
        if len(self._held) >= WINDOW:
            self._room.clear()
        key = key_of(held.verb, held.body) or message
        if key in self._queues:
            self._queues[key].append(held)
            return
        self._queues[key] = deque([held])
        self._tasks.spawn(self._work(key), name=f"commands-{key}")

    # ---- carrying out --------------------------------------------------------------------------------

    async def _work(self, key: str) -> None:
        """Carry out the commands about one object, one after another."""
        queue = self._queues[key]
        try:
            while queue and not self._stopping.is_set():
                held = queue[0]
                if await self._finish(held):
                    # If this is lost, the command comes again, is recognised and acknowledged again.
                    await self._signal(held, _ACK)
                self._release(queue.popleft())
        finally:
            del self._queues[key]
            for held in queue:
                self._release(held)

    def _release(self, held: _Held) -> None:
        self._held.pop(held.message, None)
        if len(self._held) < WINDOW:
            self._room.set()

    async def _finish(self, held: _Held) -> bool:
        """Bring one command to its outcome; False: it has none yet, and will be delivered again."""
        try:
            done = await self._conclude(held)
        except asyncio.CancelledError:
            await self._give_back(held)
            raise
        if not done:
            await self._give_back(held)
        return done

    async def _conclude(self, held: _Held) -> bool:
        async with self._places:
            # Counted only now: what waits for its turn when the node agent ends had no part in that.
            if self._stopping.is_set():
                return False
            receipt = await self._surely(lambda: self._received.receive(held.message))
            if receipt is None:
                return False
            if receipt.outcome is not None:
                return True
            held.counted = True
            if receipt.deliveries > MAX_DELIVERIES:
                first = self._refuse_poison(held, receipt.deliveries)
            else:
                first = await self._attempt(held)
        outcome = await self._try_again(held, first)
        if outcome is None:
            return False
        kind, data = tell(held.verb, outcome, deliveries=receipt.deliveries, max_deliveries=MAX_DELIVERIES)
        command_id = outcome.headers[wire.COMMAND_ID]
        audit = None
        if outcome.audit is not None:
            stored = Stored(outcome.ok, outcome.body, None if outcome.ok else outcome.code, outcome.number)
            audit = concluded(outcome.audit, stored)
        told = await self._surely(
            lambda: self._tell(held.message, kind, command_id, data, audit, outcome.traceparent)
        )
        return told is not None

    async def _tell(
        self,
        message: str,
        kind: EventKind,
        command_id: str,
        data: JsonObject,
        audit: AuditRecord | None,
        traceparent: str | None,
    ) -> bool:
        await self._received.conclude(message, kind, command_id, data, audit, traceparent=traceparent)
        return True

    async def _give_back(self, held: _Held) -> None:
        """Take back that *held* was begun: the node agent has undone it, and ends in order."""
        if not held.counted:
            return
        try:
            await self._received.give_back(held.message)
        except VcnodeError as exc:  # it then counts as one of several; nothing else is wrong
            self._complain(exc)

    async def _try_again(self, held: _Held, outcome: Outcome) -> Outcome | None:
        """Run a command until it ends in a way that stays; None: the node stops first."""
        attempts, wait_s = 1, ATTEMPT_FIRST_S
        while outcome.retryable:
            if self._stopping.is_set() or await self._stops_within(wait_s):
                return None
            if attempts == MAX_ATTEMPTS:
                return outcome
            attempts, wait_s = attempts + 1, min(2 * wait_s, ATTEMPT_MAX_S)
            async with self._places:
                outcome = await self._attempt(held)
        return outcome

    async def _attempt(self, held: _Held) -> Outcome:
        command = COMMANDS.get(held.verb)
        if command is not None and not command.mutates:
            return self._dispatcher.refuse(
                held.verb, held.headers, InvalidArgumentError(f"{held.verb} changes nothing: ask by request.")
            )
        try:
            slot = self._dispatcher.take_slot(held.verb)
        except VcnodeError as exc:
            return self._dispatcher.refuse(held.verb, held.headers, exc)
        try:
            return await self._dispatcher.dispatch(held.verb, held.headers, held.body, way="cmd")
        finally:
            slot.free()

    def _refuse_poison(self, held: _Held, deliveries: int) -> Outcome:
        error = InvalidArgumentError(
            f"{held.verb[:64]} was begun {deliveries - 1} times; the node agent ended each time.",
            deliveries=deliveries,
        )
        return self._dispatcher.refuse(held.verb, held.headers, error)

    async def _surely(self, write: Callable[[], Awaitable[T]]) -> T | None:
        """Try *write* until the disk takes it; None: the node stops first."""
        wait_s = ATTEMPT_FIRST_S
        while True:
            try:
                return await write()
            except VcnodeError as exc:
                self._complain(exc)
            if await self._stops_within(wait_s):
                return None
            wait_s = min(2 * wait_s, ATTEMPT_MAX_S)

    async def _stops_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds * random.uniform(0.75, 1.25)):  # noqa: S311 -- spreading
                await self._stopping.wait()
        return self._stopping.is_set()

    # ---- signals to JetStream ------------------------------------------------------------------------

    async def _show_life(self) -> None:
        """Tell JetStream every now and then that what is held is being worked on."""
        while not await self._stops_within(ACK_WAIT_S / 3):
            for held in tuple(self._held.values()):
                await self._signal(held, _IN_PROGRESS)

    async def _signal(self, held: _Held, signal: bytes) -> None:
        try:
            await self._connection.publish(held.reply, signal, {})
        except VcnodeError as exc:
            log.debug("A signal to JetStream could not be sent", exc_info=exc)

    def _on_change(self, up: bool) -> None:
        if not up:
            self._session.interrupt(_ConnectionLost())

    def _complain(self, exc: Exception) -> None:
        """Log what is wrong, once per cause rather than at each of endless attempts."""
        text = f"{type(exc).__name__}: {exc}"
        if isinstance(exc, nats.js.errors.ServiceUnavailableError):
            text = "the server has no JetStream, or none for this account"
        level = logging.DEBUG if text == self._last_complaint else logging.WARNING
        self._last_complaint = text
        known = isinstance(exc, (nats.errors.Error, OSError, TimeoutError, VcnodeError))
        log.log(level, "Durable commands wait: %s", text, exc_info=None if known else exc)


def name_of(msg: Msg) -> str:
    """What names a message for ever: its place in the stream, and the microsecond at which it got there."""
    meta = msg.metadata
    return f"{meta.sequence.stream}-{int(meta.timestamp.timestamp() * 1e6)}"


def key_of(verb: str, body: bytes) -> str | None:
    """What a command is about: commands with the same key run one after another. None: nothing is known."""
    try:
        fields = json.loads(body)
    except ValueError:
        return None
    if not isinstance(fields, Mapping):
        return None
    pod = fields.get("pod")
    spec_id = pod.get("id") if isinstance(pod, Mapping) else None
    found = fields.get("pod_id") or spec_id or fields.get("name")
    if not isinstance(found, str):
        return None
    return f"{'image' if verb.startswith('image.') else 'pod'}/{found[:256]}"


def tell(
    verb: str, outcome: Outcome, *, deliveries: int, max_deliveries: int
) -> tuple[EventKind, JsonObject]:
    """The event that tells how a durable command ended."""
    body = json.loads(outcome.body)
    data: JsonObject = {
        "verb": verb[:128],
        "command_id": outcome.headers[wire.COMMAND_ID],
        "ok": outcome.ok,
        "code": outcome.code,
        # A second delivery finds its own first reply: that is no duplicate.
        "duplicate": wire.DUPLICATE in outcome.headers and deliveries == 1,
        "deliveries": deliveries,
    }
    if not outcome.ok:
        data["error"] = body
    elif len(outcome.body) <= MAX_REPLY_BYTES:
        data["reply"] = body
    else:
        data["reply_bytes"] = len(outcome.body)
    if outcome.ok:
        return EventKind.COMMAND_DONE, data
    if outcome.code == InvalidArgumentError.code or deliveries > max_deliveries:
        return EventKind.COMMAND_REJECTED, data
    details = body.get("details") or {}
    if outcome.code == "deadline_exceeded" and details.get("begun") is False:
        return EventKind.COMMAND_EXPIRED, data
    return EventKind.COMMAND_DONE, data
