"""The sessions of this node: their clients come, fall silent, come back and go."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Protocol

from vcnode import aio
from vcnode.aio import Spawner
from vcnode.errors import NotFoundError, ResourceExhaustedError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.sessions import (
    Session,
    SessionClosed,
    SessionKind,
    SessionOptions,
    Sessions,
    SessionStatus,
    SessionSubjects,
    StreamPosition,
)
from vcnode.models.subjects import Subjects
from vcnode.sessions import frames
from vcnode.sessions.carrier import Carrier, OverError
from vcnode.sessions.endpoint import Dismissed, Endpoint
from vcnode.sessions.frames import CONTROL_DOWN, CONTROL_UP, Channel, FrameError, Parts, State

log = logging.getLogger(__name__)

CHUNK_BYTES = 512 * 1024
RESERVE_BYTES = 1024
"""Room for headers in a message."""
CLOSE_LIMIT_S = 10.0
"""Seconds for the work of a session to let go of what it holds."""
GOODBYE_S = 3.0
"""Seconds for the clients to hear that the node stops."""
MAX_REMEMBERED = 1000
"""Sessions that are over and whose end can still be explained."""


class Transport(Protocol):
    """Carries frames; the bus."""

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message."""
        ...

    async def publish_frame(self, session_id: str, channel: Channel, parts: Parts) -> None:
        """Send a frame. Raises UnavailableError when it cannot be sent now."""
        ...


class Work(Protocol):
    """What a session is for."""

    streams: tuple[int, ...]
    """Those that are open from the start."""

    async def run(self, session: LiveSession) -> None:
        """Do it, to its end; errors are told to the client. May be cancelled."""
        ...

    async def close(self) -> None:
        """Let go of everything. Idempotent."""
        ...


class LiveSession:
    """One session; its `carrier` outlives its clients."""

    def __init__(
        self,
        kind: SessionKind,
        pod_id: str,
        container_id: str | None,
        options: SessionOptions,
        work: Work,
        call: Call,
        opened_at: datetime,
        *,
        tty: bool,
    ) -> None:
        self.session_id = secrets.token_hex(16)
        self.kind = kind
        self.pod_id = pod_id
        self.container_id = container_id
        self.options = options
        self.work = work
        self.command_id = call.command_id
        self.opened_at = opened_at
        self.tty = tty
        self.carrier: Carrier
        self.section = aio.Interruptible()
        self.alone_since: float | None = None
        """Since when there is no client, if the session is kept without one."""
        self.changed = asyncio.Event()

    def detach(self) -> None:
        """The client has gone, and wants to find the session again."""
        self.carrier.endpoint.detach()
        self.alone_since = self.carrier.now()
        self.changed.set()


class SessionRegistry:
    """All sessions.

    Args:
        node_name: In subjects.
        subjects: Names under the prefix.
        tasks: Runs them.
        clock: The time of day, with zone.
        limit: Most at once.
        window_bytes: See `Session.window_bytes`.
    """

    def __init__(
        self,
        *,
        node_name: str,
        subjects: Subjects,
        tasks: Spawner,
        clock: Callable[[], datetime],
        limit: int,
        window_bytes: int,
    ) -> None:
        self._node_name = node_name
        self._subjects = subjects
        self._tasks = tasks
        self._clock = clock
        self._limit = limit
        self._window = window_bytes
        self._all: dict[str, LiveSession] = {}
        self._over: OrderedDict[str, str] = OrderedDict()
        self._transport: Transport | None = None
        self.received_bytes = 0
        """Bytes of all frames that have come from clients, and that some session took."""
        self.sent_bytes = 0
        """Bytes of all frames that were sent to clients, those that were sent again included."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How many there are of each kind."""
        return Counter(session.kind for session in self._all.values())

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._all)

    def use(self, transport: Transport) -> None:
        """Send frames through *transport* from now on."""
        self._transport = transport

    # -- commands ----------------------------------------------------------------------------------

    def check_room(self) -> None:
        """See that one more may be opened. Raises ResourceExhaustedError."""
        if len(self._all) >= self._limit:
            raise ResourceExhaustedError(
                f"The node has {self._limit} sessions open; close one, or try again later.", limit=self._limit
            )

    def begin(self, session: LiveSession) -> Session:
        """Start a session; its work is closed at its end, whatever happens."""
        endpoint = Endpoint(
            client=False, epoch=1, window=self._window, chunk=self._chunk_bytes(), now=Carrier.now()
        )
        session_id = session.session_id

        async def publish(channel: Channel, parts: Parts) -> None:
            if self._transport is not None:
                await self._transport.publish_frame(session_id, channel, parts)
                self.sent_bytes += sum(map(len, parts))

        session.carrier = Carrier(endpoint, publish)
        streams = (CONTROL_UP, CONTROL_DOWN, *session.work.streams)
        for stream in streams:
            session.carrier.open(stream)
        self._all[session_id] = session
        self._tasks.spawn(self._run(session), name=f"{session.kind} session of {session.pod_id}")
        return self._describe(session, dict.fromkeys(streams, 0))

    def resume(self, session_id: str) -> Session:
        """Let another client take a session over; the one before is told that it lost it.

        Raises:
            NotFoundError: It is over, or there never was one.
        """
        session = self._all.get(session_id)
        if session is None:
            raise NotFoundError(self._why_over(session_id))
        positions = session.carrier.endpoint.next_epoch()
        session.carrier.endpoint.heard_at = Carrier.now()
        session.alone_since = None
        session.changed.set()
        session.carrier.wake()
        return self._describe(session, positions)

    def list(self, pod_id: str | None) -> Sessions:
        """All sessions, or those of one pod."""
        return Sessions(
            sessions=tuple(
                SessionStatus(
                    kind=s.kind,
                    pod_id=s.pod_id,
                    container_id=s.container_id,
                    command_id=s.command_id,
                    attached=s.carrier.endpoint.attached,
                    opened_at=s.opened_at,
                )
                for s in self._all.values()
                if pod_id in (None, s.pod_id)
            )
        )

    def close(self, session_id: str) -> SessionClosed:
        """End a session; what it ran is killed. Idempotent."""
        session = self._all.get(session_id)
        if session is not None:
            self._end(session, "It was closed by session.close.")
        return SessionClosed(existed=session is not None)

    async def stop(self) -> None:
        """End all: the node agent stops. Their clients are told."""
        for session in list(self._all.values()):
            self._end(session, "The node agent is stopping.")
        try:
            async with asyncio.timeout(GOODBYE_S):
                while self._all:
                    session = next(iter(self._all.values()))
                    await session.section.ended()
                    await asyncio.sleep(0)
        except TimeoutError:
            log.warning("%d sessions did not end in time", len(self._all))

    # -- frames ------------------------------------------------------------------------------------

    async def receive(self, session_id: str, raw: bytes) -> None:
        """Take a frame; never raises. Who speaks of a session that is over is told so."""
        session = self._all.get(session_id)
        if session is not None:
            self.received_bytes += len(raw)
            stale = _epoch_of(raw)
            session.carrier.receive(raw)
            if stale is None or stale >= session.carrier.endpoint.epoch:
                return
            bye = frames.encode_bye(stale, "aborted", "Another client has resumed this session.")
        elif (stale := _epoch_of(raw)) is not None:
            bye = frames.encode_bye(stale, "not_found", self._why_over(session_id))
        else:
            return
        if self._transport is not None:
            try:
                await self._transport.publish_frame(session_id, "control", (bye,))
            except VcnodeError as exc:
                log.debug("A client could not be told that its session is over", exc_info=exc)

    def reconnected(self) -> None:
        """The bus was away and is back: ask each client what it has, and give it time to come back too."""
        for session in self._all.values():
            session.carrier.endpoint.heard_at = Carrier.now()
            session.carrier.probe()

    # -- one session -------------------------------------------------------------------------------

    async def _run(self, session: LiveSession) -> None:
        carrier = session.carrier
        helpers = [
            self._tasks.spawn(carrier.run(), name="session sender"),
            self._tasks.spawn(self._watch(session), name="session watch"),
        ]
        reason, finished = "It has ended.", False
        try:
            async with session.section:
                await self._work(session)
                await carrier.until_consumed()
                finished = True
        except _EndedError as exc:
            reason = str(exc)
            log.info("A session of %s was ended: %s", session.pod_id, reason)
        except OverError:
            reason = "Its client broke the protocol."
        finally:
            if not finished:
                await aio.finish(self._say_bye(session, reason), timeout_s=GOODBYE_S)
            carrier.close(Dismissed("aborted", reason))
            for helper in helpers:
                helper.cancel()
            self._all.pop(session.session_id, None)
            self._over[session.session_id] = reason
            if len(self._over) > MAX_REMEMBERED:
                self._over.popitem(last=False)
            await aio.finish(session.work.close(), timeout_s=CLOSE_LIMIT_S)

    async def _work(self, session: LiveSession) -> None:
        """Do what the session is for, and tell the client of failure; then no more messages come."""
        carrier = session.carrier
        try:
            await session.work.run(session)
        except VcnodeError as exc:
            error = {"code": exc.code, "message": exc.message}
            await carrier.send_message({"error": error})
        for stream in session.work.streams:
            if stream & 1:
                carrier.end(stream)
            else:
                carrier.refuse(stream)
        carrier.end(CONTROL_DOWN)

    async def _say_bye(self, session: LiveSession, reason: str) -> None:
        if self._transport is None:
            return
        bye = frames.encode_bye(session.carrier.endpoint.epoch, "aborted", f"The session was ended. {reason}")
        try:
            await self._transport.publish_frame(session.session_id, "control", (bye,))
        except VcnodeError as exc:
            log.debug("A client could not be told that its session was ended", exc_info=exc)

    async def _watch(self, session: LiveSession) -> None:
        """End or keep the session when its client falls silent."""
        endpoint, options = session.carrier.endpoint, session.options
        while True:
            session.changed.clear()
            if session.alone_since is None:
                left = endpoint.heard_at + options.lost_after_s - Carrier.now()
            else:
                left = session.alone_since + options.keep_s - Carrier.now()
            if left > 0:
                try:
                    async with asyncio.timeout(left):
                        await session.changed.wait()
                except TimeoutError:
                    pass  # look again: it may have spoken meanwhile
            elif session.alone_since is not None:
                self._end(session, f"No client came back within {options.keep_s:g} s.")
                return
            elif options.when_lost == "keep":
                session.detach()
            else:
                self._end(session, f"Nothing was heard of its client for {options.lost_after_s:g} s.")
                return

    def _end(self, session: LiveSession, reason: str) -> None:
        session.section.interrupt(_EndedError(reason))

    # -- helpers -----------------------------------------------------------------------------------

    def _why_over(self, session_id: str) -> str:
        reason = self._over.get(session_id)
        if reason is not None:
            return f"The session is over: {reason}"
        return "There is no such session; when the node agent is restarted, its sessions end."

    def _chunk_bytes(self) -> int:
        limit = CHUNK_BYTES if self._transport is None else self._transport.max_payload - RESERVE_BYTES
        return max(4096, min(CHUNK_BYTES, limit))

    def _describe(self, session: LiveSession, positions: dict[int, int]) -> Session:
        def subject(channel: Channel) -> str:
            return self._subjects.io(self._node_name, session.session_id, channel)

        return Session(
            session_id=session.session_id,
            kind=session.kind,
            pod_id=session.pod_id,
            container_id=session.container_id,
            epoch=session.carrier.endpoint.epoch,
            window_bytes=self._window,
            chunk_bytes=self._chunk_bytes(),
            lost_after_s=session.options.lost_after_s,
            subjects=SessionSubjects(
                stdin=subject("stdin"),
                stdout=subject("stdout"),
                stderr=subject("stderr"),
                control=subject("control"),
            ),
            streams=tuple(StreamPosition(stream=s, offset=o) for s, o in sorted(positions.items())),
            tty=session.tty,
        )


class _EndedError(Exception):
    """The session was ended from outside; the text says why."""


def _epoch_of(raw: bytes) -> int | None:
    """The epoch of a client's state; None for anything else."""
    try:
        frame = frames.decode(raw)
    except FrameError:
        return None
    return frame.epoch if isinstance(frame, State) and frame.from_client else None
