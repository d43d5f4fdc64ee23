"""From the bytes of one command to the bytes of its reply, whatever carried them.

The order of things, for a command that changes something::

    headers -> lane -> body -> deadline -> journal.begin -> policy -> handler -> journal.finish -> reply

Nothing is done before ``journal.begin`` has been committed, and nothing is replied before
``journal.finish`` has been. A reply is never an exception: whatever happens becomes an `Outcome`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol, cast

from vcnode import aio, logs
from vcnode.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    StorageError,
    UnavailableError,
    VcnodeError,
)
from vcnode.handlers import auditing
from vcnode.handlers import headers as meta_headers
from vcnode.handlers.about import about
from vcnode.handlers.auditing import Way
from vcnode.handlers.decode import decode, decode_again
from vcnode.handlers.lanes import Lanes, Slot
from vcnode.handlers.outcome import Outcome, as_duplicate, error_outcome, from_stored, with_id
from vcnode.handlers.routes import AT_ONCE, ROUTES
from vcnode.handlers.services import Services
from vcnode.handlers.unkept import Unkept
from vcnode.models import wire
from vcnode.models.audit import AuditRecord
from vcnode.models.base import Reply, Request
from vcnode.models.call import Call
from vcnode.models.commands import COMMANDS, Command
from vcnode.pods.stored import Stored
from vcnode.tracing import Tracing, trace_id_of

log = logging.getLogger(__name__)

_RUN = secrets.token_hex(12)
_NUMBERS = itertools.count(1)
JOURNAL_TIMEOUT_S = 30.0
"""Limit of one write to the journal; a disk that takes longer counts as failed."""


class Journal(Protocol):
    """What dispatch needs of `vcnode.pods.journal.Journal`."""

    async def begin(
        self, command_id: str, verb: str, digest: str, audit: AuditRecord | None = None
    ) -> Stored | None:
        """Note a command as in progress (None), or find the reply that it got before."""
        ...

    async def finish(self, command_id: str, stored: Stored) -> None:
        """Keep the reply of a command."""
        ...

    async def forget(self, command_id: str) -> None:
        """Drop a command that had no effect and may be sent again."""
        ...


class Observer(Protocol):
    """Hears how commands end."""

    def command_done(self, verb: str, code: str, seconds: float, traceparent: str | None = None) -> None:
        """*verb* was answered with *code* (``ok`` or an error's) after *seconds*, within that trace."""
        ...


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A command that has passed every check that needs no service."""

    command: Command
    request: Request
    call: Call
    seconds: float
    """How long it may take."""
    deadline: float
    """Loop time at which these have passed."""
    digest: str
    audit: AuditRecord | None
    """What is to be told of it."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A command in progress, for others with the same id to join."""

    verb: str
    digest: str
    outcome: asyncio.Future[Outcome]


class Dispatcher:
    """Runs commands.

    Args:
        services: What the handlers work with.
        journal: Where commands and their replies are kept.
        max_concurrent: Commands in progress at once, in each lane.
        max_waits: The same for commands that only wait.
        max_request_bytes: Largest body.
        observer: Hears how each command ended.
        clock: The time of day, with zone.
        tasks: Owner of what goes on in the background.
        audits: Whether commands that may change something are told of in audit events.
        trusts_request_info: Whether the NATS server's word on a sender cannot be somebody else's.
    """

    def __init__(
        self,
        services: Services,
        journal: Journal,
        *,
        max_concurrent: int,
        max_waits: int = 1024,
        max_request_bytes: int,
        observer: Observer,
        clock: Callable[[], datetime],
        tasks: aio.Spawner,
        audits: bool = False,
        trusts_request_info: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing or Tracing()
        self._audits = audits
        self._trusts_request_info = trusts_request_info
        self._services = services
        self._journal = journal
        self._lanes = Lanes(max_concurrent, max_waits)
        self._max_request_bytes = max_request_bytes
        self._observer = observer
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._unkept = Unkept(tasks)
        self._draining = False

    @property
    def in_progress(self) -> int:
        """How many slots are taken, over all lanes."""
        return self._lanes.taken

    def drain(self) -> None:
        """From now on answer commands that change something with ``unavailable``; reads go on."""
        self._draining = True
        self._services.node.drain()

    def take_slot(self, verb: str) -> Slot:
        """Take a place for one command.

        Raises:
            ResourceExhaustedError: As many commands as the node takes are in progress.
            InvalidArgumentError: No such verb.
        """
        return self._lanes.take(_command(verb))

    def refuse(self, verb: str, headers: Mapping[str, str], error: VcnodeError) -> Outcome:
        """The reply to a command that is not even begun."""
        try:
            meta = meta_headers.parse(headers)
            given, traceparent = meta.command_id, meta.traceparent
        except InvalidArgumentError:
            given, traceparent = None, None
        command_id = given or new_command_id()
        with logs.about(**_marks(verb, command_id, traceparent)):
            outcome = with_id(error_outcome(error, verb), command_id)
        self._observer.command_done(verb, outcome.code, 0.0)
        return outcome

    async def dispatch(
        self, verb: str, headers: Mapping[str, str], body: bytes, *, way: Way = "rpc"
    ) -> Outcome:
        """Carry out one command.

        Args:
            verb: Such as ``pod.create``.
            headers: As received.
            body: As received.
            way: How it came.

        Returns:
            The reply, for errors of every kind too. A cancellation (the node stops) is answered with
            ``unavailable`` after the command's undo; it does not propagate.
        """
        if verb in AT_ONCE:
            return self.answer(verb, headers, body)
        started = time.monotonic()
        command_id = new_command_id()
        traceparent: str | None = None

        async def work() -> Outcome:
            nonlocal command_id, traceparent
            meta = meta_headers.parse(headers)
            command_id = meta.command_id or command_id
            with self._tracing.command(verb, command_id, meta.traceparent, way=way) as span:
                traceparent = span.traceparent
                with logs.about(**_marks(verb, command_id, traceparent)):
                    traced = replace(meta, traceparent=traceparent)
                    outcome = await _settled(verb, self._checked(verb, traced, command_id, body, way))
                span.ended(outcome.code)
                return outcome

        outcome = await _settled(verb, work())
        self._observer.command_done(verb, outcome.code, time.monotonic() - started, traceparent)
        return with_id(outcome, command_id, traceparent)

    async def _checked(
        self, verb: str, meta: meta_headers.Meta, command_id: str, body: bytes, way: Way
    ) -> Outcome:
        prepared = self._prepare(verb, meta, command_id, body, way)
        with logs.about(**about(prepared.request)):
            return await _settled(verb, self._run(prepared))

    def answer(self, verb: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Carry out one command of `AT_ONCE`; as `dispatch`, but without waiting for anything.

        These are most of what a scheduler sends, so they get no task, no slot, no timer and no span.
        """
        started = time.monotonic()
        command_id = new_command_id()
        traceparent: str | None = None
        request: Request | None = None
        try:
            meta = meta_headers.parse(headers)
            command_id, traceparent = meta.command_id or command_id, meta.traceparent
            call = Call(command_id, verb, None, meta.expected_revision, traceparent)
            self._check_size(body)
            request = decode_again(COMMANDS[verb].request, body)
            if meta.deadline is not None:
                self._seconds_until(meta.deadline)
            reply = cast(Reply, ROUTES[verb](self._services, call, request))
            outcome = Outcome(reply.encoded, {wire.COMMAND_ID: command_id}, quiet=reply.quiet)
        except Exception as exc:
            names = about(request) if request is not None else {}
            with logs.about(**_marks(verb, command_id, traceparent), **names):
                outcome = with_id(error_outcome(exc, verb), command_id)
        self._observer.command_done(verb, outcome.code, time.monotonic() - started, traceparent)
        return outcome

    def _check_size(self, body: bytes) -> None:
        if len(body) > self._max_request_bytes:
            raise InvalidArgumentError(
                f"The body has {len(body)} bytes; at most {self._max_request_bytes} are taken.",
                size_bytes=len(body),
                limit_bytes=self._max_request_bytes,
                violations=[{"field": "", "message": f"at most {self._max_request_bytes} bytes"}],
            )

    def _seconds_until(self, deadline: datetime) -> float:
        now = self._clock()
        seconds = (deadline - now).total_seconds()
        if seconds <= 0:
            raise DeadlineExceededError(
                "By this node's clock the deadline had passed on arrival; nothing was done.",
                deadline=deadline.isoformat(),
                now=now.isoformat(),
                begun=False,
            )
        return seconds

    def _prepare(
        self, verb: str, meta: meta_headers.Meta, command_id: str, body: bytes, way: Way
    ) -> _Prepared:
        command = _command(verb)
        if self._draining and command.mutates:
            raise UnavailableError("The node is stopping and takes no new commands.")
        self._check_size(body)
        request = decode(command.request, body)
        seconds = command.default_timeout_s
        if meta.deadline is not None:
            seconds = self._seconds_until(meta.deadline)
        deadline = asyncio.get_running_loop().time() + seconds
        call = Call(
            command_id=command_id,
            verb=verb,
            deadline=deadline,
            expected_revision=meta.expected_revision,
            traceparent=meta.traceparent,
        )
        digest = digest_of(request) if command.mutates else ""
        audit = None
        if command.mutates and self._audits:
            audit = auditing.begin(
                verb,
                command_id,
                request,
                meta,
                way=way,
                now=self._clock(),
                trusted=self._trusts_request_info,
            )
        return _Prepared(command, request, call, seconds, deadline, digest, audit)

    async def _run(self, prepared: _Prepared) -> Outcome:
        if not prepared.command.mutates:
            return await self._handle(prepared)
        command_id = prepared.call.command_id
        if (first := self._running.get(command_id)) is not None:
            return await self._join(prepared, first)
        if (unkept := self._unkept.find(command_id, prepared.call.verb, prepared.digest)) is not None:
            return unkept
        self._unkept.check_room()
        running = _Running(prepared.call.verb, prepared.digest, asyncio.get_running_loop().create_future())
        self._running[command_id] = running
        try:
            outcome = await _settled(prepared.call.verb, self._run_once(prepared))
            running.outcome.set_result(outcome)
            return outcome
        finally:
            del self._running[command_id]
            running.outcome.cancel()  # has no effect on a result; frees who waits when the process ends

    async def _join(self, prepared: _Prepared, running: _Running) -> Outcome:
        """Wait for the first of two equal commands and give its reply to the second as well."""
        if (running.verb, running.digest) != (prepared.call.verb, prepared.digest):
            raise AlreadyExistsError(
                f"Command id {prepared.call.command_id} is in use by another {running.verb}; "
                "give each command its own id.",
                command_id=prepared.call.command_id,
                verb=running.verb,
            )
        async with aio.deadline_as(prepared.seconds, lambda: _too_late(prepared)):
            return as_duplicate(await asyncio.shield(running.outcome))

    async def _run_once(self, prepared: _Prepared) -> Outcome:
        """Run a command between its two journal entries."""
        stored = await self._begin(prepared)
        if stored is not None:
            return as_duplicate(from_stored(stored))
        outcome = await _settled(prepared.call.verb, self._handle(prepared), begun=True)
        await self._conclude(prepared, outcome)
        # What the journal has forgotten is told by whoever gives up repeating it, if anybody does.
        return replace(outcome, audit=prepared.audit) if outcome.retryable else outcome

    async def _begin(self, prepared: _Prepared) -> Stored | None:
        command_id = prepared.call.command_id
        begin = self._journal.begin(command_id, prepared.call.verb, prepared.digest, prepared.audit)
        try:
            return await aio.finish(begin, timeout_s=JOURNAL_TIMEOUT_S)
        except (TimeoutError, StorageError) as exc:
            if isinstance(exc, StorageError) and exc.details.get("settled", True):
                raise
            # It may be written yet, and would stand there as in progress for ever.
            self._add_unkept(prepared, None, lambda: self._journal.forget(command_id))
            raise UnavailableError(
                f"The journal did not take the command within {JOURNAL_TIMEOUT_S:g} s; nothing was done."
            ) from exc
        except asyncio.CancelledError:
            await aio.finish(self._journal.forget(command_id), timeout_s=JOURNAL_TIMEOUT_S)
            raise

    async def _conclude(self, prepared: _Prepared, outcome: Outcome) -> None:
        """Keep the reply; what had no effect and may be tried again is forgotten instead.

        A journal that cannot be written does not turn a success into a failure: the caller still gets the
        reply, so does who sends the command again, and it is written when that is possible. After a restart
        before that the command counts as unfinished.
        """
        command_id = prepared.call.command_id
        stored = Stored(
            ok=outcome.ok,
            body=outcome.body,
            code=None if outcome.ok else outcome.code,
            number=outcome.number,
        )

        async def write() -> None:
            if outcome.retryable:
                await self._journal.forget(command_id)
            else:
                await self._journal.finish(command_id, stored)

        try:
            await aio.finish(write(), timeout_s=JOURNAL_TIMEOUT_S)
        except (VcnodeError, TimeoutError):
            log.exception("The reply of command %s could not be kept; trying again", command_id)
            self._add_unkept(prepared, None if outcome.retryable else outcome, write)
        except asyncio.CancelledError as exc:
            _cancelled(exc)  # the entry is written and the reply is at hand: give it

    def _add_unkept(
        self, prepared: _Prepared, outcome: Outcome | None, write: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        call = prepared.call
        self._unkept.add(call.command_id, call.verb, prepared.digest, outcome, write)

    async def _handle(self, prepared: _Prepared) -> Outcome:
        if prepared.command.mutates:
            self._services.pods.permit(prepared.request)
        handler = ROUTES[prepared.command.verb]
        left_s = prepared.deadline - asyncio.get_running_loop().time()  # the journal has had its share
        async with aio.deadline_as(left_s, lambda: _too_late(prepared)):
            reply = await cast(Awaitable[Reply], handler(self._services, prepared.call, prepared.request))
        return Outcome(body=reply.encoded, headers={})


async def _settled(verb: str, work: Coroutine[Any, Any, Outcome], *, begun: bool = False) -> Outcome:
    """Await *work*; whatever it raises becomes a reply."""
    try:
        return await work
    except asyncio.CancelledError as exc:
        return error_outcome(_cancelled(exc), verb, begun=begun)
    except Exception as exc:
        return error_outcome(exc, verb, begun=begun)


def _marks(verb: str, command_id: str, traceparent: str | None) -> dict[str, str]:
    """What the log lines of a command carry, whatever it is about."""
    marks = {"verb": verb, "command_id": command_id}
    if (trace_id := trace_id_of(traceparent)) is not None:
        marks["trace_id"] = trace_id
    return marks


def new_command_id() -> str:
    """An id for a command that came without one."""
    return f"c-{_RUN}-{next(_NUMBERS):x}"


def digest_of(request: Request) -> str:
    """Digest of what the caller asked for, the same however it was spelled in JSON."""
    fields = request.model_dump(mode="json", exclude_unset=True)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _command(verb: str) -> Command:
    try:
        return COMMANDS[verb]
    except KeyError as exc:
        raise InvalidArgumentError(
            f"There is no command {verb[:64]!r}.", violations=[{"field": "", "message": "unknown command"}]
        ) from exc


def _too_late(prepared: _Prepared) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"{prepared.command.verb} was not done within {prepared.seconds:.3g} s; ask for the status.",
        begun=True,
    )


def _cancelled(exc: BaseException) -> BaseException:
    """What to answer to a cancellation: the node stops, or (nobody cancelled this task) there is a bug.

    The cancellation counts as taken care of afterwards, so that the reply can still be sent.
    """
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return exc
    while task.cancelling():
        task.uncancel()
    return UnavailableError("The node is stopping; the command was given up and undone.")
