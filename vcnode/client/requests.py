"""Requests that survive a reconnect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import nats.errors

from vcnode.bus import options
from vcnode.bus.library import SturdyClient, uncancelled
from vcnode.errors import InvalidArgumentError, UnavailableError
from vcnode.settings import NatsSettings

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log = logging.getLogger(__name__)

HEADER_RESERVE_BYTES = 4096
RESEND_S = 0.5
"""Seconds between attempts to reach a node that comes back later than this client."""
CLOSE_TIMEOUT_S = 5.0
ENQUEUE_TIMEOUT_S = 10.0
MAX_SCATTER_REPLIES = 100_000


class _Change(Enum):
    RECONNECTED = "reconnected"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class _Message:
    """A request as it is sent, once or more."""

    subject: str
    body: bytes
    headers: dict[str, str]
    token: str
    """Finds the request again for which a reply comes in."""


@dataclass(slots=True)
class _Waiting:
    """What is known while a reply is awaited."""

    outage: bool
    """Whether the connection was away: then the other side may come back later than this one."""
    nobody: bool = False
    """Whether the last that was heard is that nobody listens."""


class NobodyListensError(UnavailableError):
    """No subscriber on the subject of a request."""


class Poll:
    """One question to many; made by `Requester.poll`.

    Args:
        put: Sends the question to a subject.
        changes: What comes in.
    """

    def __init__(self, put: Callable[[str], Awaitable[None]], changes: asyncio.Queue[Msg | _Change]) -> None:
        self._put = put
        self._changes = changes
        self._asked = 0
        self._silent = 0

    async def ask(self, subjects: Sequence[str]) -> None:
        """Put the question on these too.

        Raises:
            UnavailableError: It could not be handed to NATS.
        """
        self._asked += len(subjects)
        for subject in subjects:
            await self._put(subject)

    async def collect(self, *, timeout_s: float, enough: int, settle_s: float | None = None) -> list[Msg]:
        """The replies that have come since the last call, and those that come now.

        Args:
            timeout_s: Seconds for which they are awaited; not at all where nobody listens.
            enough: Stop early once so many have come.
            settle_s: Stop so many seconds after the first one; None: wait for the others as long.
        """
        found: list[Msg] = []
        try:
            async with asyncio.timeout(timeout_s) as limit:
                while len(found) < enough and (self._silent < self._asked or not self._changes.empty()):
                    change = await self._changes.get()
                    if isinstance(change, _Change):
                        continue
                    if _nobody_listens(change):
                        self._silent += 1
                        continue
                    if not found and settle_s is not None:
                        limit.reschedule(asyncio.get_running_loop().time() + settle_s)
                    found.append(change)
        except TimeoutError:
            pass  # that is how asking everybody ends
        return found


class Requester:
    """One connection, and the requests in progress on it."""

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._client = SturdyClient(require_tls=options.wants_tls(settings))
        self._inbox = ""
        self._waiting: dict[str, asyncio.Queue[Msg | _Change]] = {}
        self._watchers: set[Callable[[], None]] = set()
        self._last_error: Exception | None = None

    @property
    def actor(self) -> str | None:
        """What this client says of itself with each command."""
        return self._settings.actor

    @property
    def client(self) -> SturdyClient:
        """The connection itself."""
        return self._client

    def watch(self, watcher: Callable[[], None]) -> Callable[[], None]:
        """Have *watcher* called when the connection is back after a loss, or is closed; returns the undo."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    async def connect(self, *, name: str) -> None:
        """Connect, within ``connect_timeout_s`` of the settings.

        Raises:
            UnavailableError: NATS cannot be reached, or does not let us in; says why.
            InvalidArgumentError: The settings contradict each other.
        """

        async def on_error(exc: Exception) -> None:
            self._last_error = exc
            log.debug("NATS: %s", exc)

        async def on_reconnected() -> None:
            self._tell(_Change.RECONNECTED)

        async def on_closed() -> None:
            self._tell(_Change.CLOSED)

        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await uncancelled(
                    self._client.connect(
                        name=name,
                        max_reconnect_attempts=-1,
                        error_cb=on_error,
                        reconnected_cb=on_reconnected,
                        closed_cb=on_closed,
                        **options.connect_options(self._settings),
                    )
                )
                self._inbox = self._client.new_inbox()
                await self._client.subscribe(f"{self._inbox}.*", cb=self._on_reply)
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            await self.close()
            where = options.display(self._settings)
            raise UnavailableError(
                f"NATS at {where} cannot be reached ({_why(self._last_error or exc)})."
            ) from exc
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the connection; requests in progress fail. Idempotent."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await uncancelled(self._client.close())
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            log.debug("The connection to NATS did not close cleanly", exc_info=exc)

    async def request(self, subject: str, body: bytes, headers: dict[str, str], *, timeout_s: float) -> Msg:
        """Send a request and wait for its reply.

        When the connection was lost meanwhile, the very same message is sent once more after the reconnect,
        and again while nobody listens there (whoever is asked may come back later than this client): only
        for what carries a command id or changes nothing.

        Raises:
            TimeoutError: No reply within *timeout_s* seconds.
            NobodyListensError: No subscriber.
            UnavailableError: The connection was closed.
            InvalidArgumentError: The message is larger than the server takes.
        """
        self._check_size(body)
        message = _Message(subject, body, headers, secrets.token_hex(12))
        changes: asyncio.Queue[Msg | _Change] = asyncio.Queue()
        self._waiting[message.token] = changes
        outcome = _Waiting(outage=not self._client.is_connected)
        try:
            async with asyncio.timeout(timeout_s):
                await self._publish(message)
                return await self._reply(message, changes, outcome)
        except TimeoutError as exc:
            if outcome.nobody:
                raise NobodyListensError(f"Nobody listens on {subject}.") from exc
            raise
        finally:
            del self._waiting[message.token]

    async def _reply(
        self, message: _Message, changes: asyncio.Queue[Msg | _Change], waiting: _Waiting
    ) -> Msg:
        resent = False
        while True:
            change = await changes.get()
            if change is _Change.CLOSED:
                raise UnavailableError("The connection to NATS was closed; make a new client.")
            if change is _Change.RECONNECTED:
                waiting.outage = True
                if not resent:
                    await self._publish(message)
                resent = True
            elif not _nobody_listens(change):
                return change
            elif not waiting.outage:
                raise NobodyListensError(f"Nobody listens on {message.subject}.")
            else:
                waiting.nobody = True
                await asyncio.sleep(RESEND_S)
                await self._publish(message)

    async def enqueue(self, subject: str, body: bytes, headers: dict[str, str], *, stream: str) -> None:
        """Have JetStream keep a message.

        Raises:
            UnavailableError: It did not take it, or its answer was lost.
            InvalidArgumentError: The message is larger than the server takes.
        """
        self._check_size(body)
        js = self._client.jetstream(timeout=ENQUEUE_TIMEOUT_S)
        try:
            await uncancelled(js.publish(subject, body, stream=stream, headers=headers))
        except (nats.errors.Error, OSError, TimeoutError) as exc:
            raise UnavailableError(f"Stream {stream} did not take a message to {subject}.") from exc

    async def tell(self, subject: str, body: bytes) -> None:
        """Send something that needs no answer.

        Raises:
            UnavailableError: It could not be handed to NATS.
        """
        try:
            await uncancelled(self._client.publish(subject, body))
        except (nats.errors.Error, OSError) as exc:
            raise UnavailableError(f"A message to {subject} could not be handed to NATS.") from exc

    async def scatter(
        self,
        subjects: Sequence[str],
        body: bytes,
        *,
        timeout_s: float,
        enough: int,
    ) -> list[Msg]:
        """Ask everybody on *subjects* and collect the replies.

        Args:
            subjects: Where to ask.
            body: The question.
            timeout_s: Seconds for which replies are collected.
            enough: Stop early once so many have come.
        """
        with self.poll(body) as poll:
            await poll.ask(subjects)
            return await poll.collect(timeout_s=timeout_s, enough=enough)

    @contextlib.contextmanager
    def poll(self, body: bytes) -> Iterator[Poll]:
        """A question that can be put to more and more, while the replies of all come in."""
        token = secrets.token_hex(12)
        changes: asyncio.Queue[Msg | _Change] = asyncio.Queue()
        self._waiting[token] = changes

        async def put(subject: str) -> None:
            await self._publish(_Message(subject, body, {}, token))

        try:
            yield Poll(put, changes)
        finally:
            del self._waiting[token]

    async def _publish(self, message: _Message) -> None:
        try:
            await uncancelled(
                self._client.publish(
                    message.subject,
                    message.body,
                    reply=f"{self._inbox}.{message.token}",
                    headers=message.headers or None,
                )
            )
        except (nats.errors.Error, OSError) as exc:
            raise UnavailableError(f"A message to {message.subject} could not be handed to NATS.") from exc

    async def _on_reply(self, msg: Msg) -> None:
        waiting = self._waiting.get(msg.subject.rpartition(".")[2])
        if waiting is not None and waiting.qsize() < MAX_SCATTER_REPLIES:
            waiting.put_nowait(msg)

    def _tell(self, change: _Change) -> None:
        for waiting in self._waiting.values():
            waiting.put_nowait(change)
        for watcher in tuple(self._watchers):
            watcher()

    def _check_size(self, body: bytes) -> None:
        limit = self._client.max_payload - HEADER_RESERVE_BYTES
        if len(body) > limit:
            # The server would end the connection for it.
            raise InvalidArgumentError(
                f"The request has {len(body)} bytes; the NATS server takes at most {limit}.",
                size_bytes=len(body),
                limit_bytes=limit,
                violations=[{"field": "", "message": f"at most {limit} bytes"}],
            )


def _why(exc: Exception) -> str:
    """What went wrong, for the message of an error."""
    if isinstance(exc, ConnectionError) and not isinstance(exc, ConnectionRefusedError):
        # nats-server closes so soon after "Authorization Violation" that the reset can overtake the word.
        return f"the server ended the connection: {exc}; are the credentials right?"
    return str(exc) or type(exc).__name__


def _nobody_listens(msg: Msg) -> bool:
    """Whether this is the server's own reply to a request without a subscriber (NATS ADR-1: 503)."""
    return not msg.data and (msg.headers or {}).get("Status") == "503"
