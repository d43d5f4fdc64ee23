"""The output of containers: from their guests into files, and from there to whoever reads or follows.

One task for each session with a guest takes batches and keeps them; a batch is acknowledged when it is kept.
Readers read the files, also those that follow: nobody's slowness holds up anybody, and no buffer grows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime

from vcnode.drivers.base import GuestSession, LogRecord
from vcnode.drivers.logfiles import Chunk, ContainerLog, LogFiles, Piece
from vcnode.errors import (
    AgentError,
    InvalidArgumentError,
    NotFoundError,
    StorageError,
    UnavailableError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.logs import about
from vcnode.models.base import Blob
from vcnode.models.logs import (
    MAX_LOG_BYTES,
    MAX_LOG_ENTRIES,
    ContainerLogEntries,
    ContainerLogs,
    LogEntry,
    LogStream,
)
from vcnode.models.pod import ContainerState
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.pods.edits import find_container
from vcnode.pods.ledger import Ledger
from vcnode.pods.lifecycle import CONTAINER_ALIVE
from vcnode.pods.statuses import container_id

log = logging.getLogger(__name__)

ASK_LIMIT_S = 30.0
DRAIN_LIMIT_S = 1.0
"""Seconds that the last output of a pod that stops may take to arrive."""
_PAUSE_S = 0.02
"""Least pause between two batches of one pod, so that a flood comes in large ones."""


class _Bell:
    """Wakes all who wait, again and again."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def ring(self) -> None:
        self.event.set()
        self.event = asyncio.Event()


class LogPump:
    """Keeps what containers write, and gives it to readers.

    Args:
        files: Where it is kept.
        ledger: Which containers there are, and whether they run.
        max_bytes_per_s: Most that is taken from one pod.
    """

    def __init__(self, files: LogFiles, ledger: Ledger, *, max_bytes_per_s: float) -> None:
        self._files = files
        self._ledger = ledger
        self._rate = max_bytes_per_s
        self._bells: dict[str, _Bell] = {}
        self._pumping: dict[str, int] = {}
        self._stopping = False
        self.lost_bytes = 0
        """Bytes of output that were lost since this process began: dropped by a guest whose ring was full, or
        for want of room on the disk."""
        self.followers = 0
        """How many wait for more."""

    # -- from the guest ----------------------------------------------------------------------------

    async def pump(self, pod_id: str, session: GuestSession) -> None:
        """Keep all that comes in this session; returns when it is over."""
        self._pumping[pod_id] = self._pumping.get(pod_id, 0) + 1
        try:
            await self._pump(pod_id, session)
        except UnsupportedError:
            log.info("Pod %s: its guest agent gives no logs", pod_id)
        except (AgentError, NotFoundError):
            pass  # whoever watches the session says more
        except VcnodeError as exc:
            log.warning("Pod %s: logs are not kept any more", pod_id, exc_info=exc)
        finally:
            self._pumping[pod_id] -= 1
            if not self._pumping[pod_id]:
                del self._pumping[pod_id]
            self._ring(pod_id)

    async def _pump(self, pod_id: str, session: GuestSession) -> None:
        ids = [container_id(c) for c in self._ledger.get(pod_id).containers]
        logs = await asyncio.to_thread(lambda: {cid: self._files.log(pod_id, cid) for cid in ids})
        known = {cid: found.guest_position for cid, found in logs.items()}
        feed = await session.follow_logs(known, timeout_s=ASK_LIMIT_S)
        try:
            async for records in feed.records():
                by_container: dict[str, list[LogRecord]] = {}
                for record in records:
                    by_container.setdefault(record.container_id, []).append(record)
                there = {container_id(c) for c in self._ledger.get(pod_id).containers}
                self.lost_bytes += await asyncio.to_thread(self._keep, pod_id, by_container, there)
                self._ring(pod_id)
                size = sum(len(record.data) for record in records)
                await asyncio.sleep(max(_PAUSE_S, size / self._rate))
        finally:
            await feed.close()

    def _keep(self, pod_id: str, records: dict[str, list[LogRecord]], there: Collection[str]) -> int:
        """Write records to the logs of the containers that are *there*; the bytes that were lost."""
        lost = 0
        for cid, found in records.items():
            if cid not in there:
                continue  # it was deleted meanwhile, or never was
            try:
                kept = self._files.log(pod_id, cid)
                before = kept.lost_bytes
                kept.append(found)
                lost += kept.lost_bytes - before
            except StorageError as exc:
                with about(container_id=cid):
                    log.warning("Pod %s: %s", pod_id, exc.message)
        return lost

    async def drained(self, pod_id: str, ids: Collection[str]) -> None:
        """Wait for the last output of containers that have ended, `DRAIN_LIMIT_S` at most."""
        try:
            async with asyncio.timeout(DRAIN_LIMIT_S):
                while pod_id in self._pumping and not await asyncio.to_thread(self._at_rest, pod_id, ids):
                    await self._bell(pod_id).event.wait()
        except TimeoutError:
            log.info("Pod %s: its last output may be lost", pod_id)
        except StorageError as exc:
            log.warning("Pod %s: %s", pod_id, exc.message)

    def _at_rest(self, pod_id: str, ids: Collection[str]) -> bool:
        return all(self._files.log(pod_id, cid).at_rest for cid in ids)

    async def forget(self, pod_id: str, cid: str | None = None) -> None:
        """Delete the logs of a pod, or of one of its containers, that is gone. Idempotent.

        What cannot be deleted now, the next audit finds.
        """
        try:
            await asyncio.to_thread(self._files.delete, pod_id, cid)
        except StorageError as exc:
            log.warning("%s", exc.message)
        self._ring(pod_id)
        if cid is None:
            self._bells.pop(pod_id, None)

    def _bell(self, pod_id: str) -> _Bell:
        return self._bells.setdefault(pod_id, _Bell())

    def _ring(self, pod_id: str) -> None:
        if (bell := self._bells.get(pod_id)) is not None:
            bell.ring()

    # -- to readers --------------------------------------------------------------------------------

    async def subscribe(
        self, pod_id: str, cid: str, *, position: int | None = None
    ) -> AsyncIterator[Sequence[Piece]]:
        """What a container writes, from *position* on (None: from now), until it has ended.

        A reader that is so slow that files are rotated away below it misses what was in them.

        Raises:
            NotFoundError: There is no such container (any more).
            StorageError: The log cannot be read.
        """
        at = position
        while True:
            bell = self._bell(pod_id).event
            record = self._ledger.get(pod_id)
            container = find_container(record, cid)
            found = await asyncio.to_thread(self._files.log, pod_id, cid)
            if at is None:
                at = found.end
            chunk = await asyncio.to_thread(_read, found, at, MAX_LOG_BYTES, None)
            at = chunk.position
            if chunk.pieces:
                yield chunk.pieces
                continue  # the container may have ended before the bell was taken: then nothing rings again
            if self._ended(pod_id, container, found):
                return
            if not chunk.more:
                await self._changed(record, bell)

    async def read(self, request: ContainerLogs) -> ContainerLogEntries:
        """Carry out ``container.logs``.

        Raises:
            NotFoundError: There is no such pod or container.
            InvalidArgumentError: The pod has several containers, and the request names none.
            StorageError: The log cannot be read.
        """
        pod_id, cid = request.pod_id, self._named(request)
        found = await asyncio.to_thread(self._files.log, pod_id, cid)
        at = await asyncio.to_thread(_begin, found, request)
        wanted = int(request.cursor) if request.cursor is not None else None
        until_ns = None if request.until is None else _ns(request.until)
        try:
            async with asyncio.timeout(request.wait_s or None):
                while True:
                    bell = self._bell(pod_id).event
                    record = self._ledger.get(pod_id)
                    container = find_container(record, cid)
                    chunk = await asyncio.to_thread(_read, found, at, request.max_bytes, until_ns)
                    at = chunk.position
                    ended = not chunk.more and self._ended(pod_id, container, found)
                    if chunk.pieces or ended or not request.wait_s or self._stopping:
                        break
                    await self._changed(record, bell)
        except TimeoutError:
            container = self._find(pod_id, cid)
            chunk, ended = Chunk([], at, at, more=False), self._ended(pod_id, container, found)
        return ContainerLogEntries(
            pod_id=pod_id,
            container_id=cid,
            entries=tuple(_entry(piece) for piece in chunk.pieces),
            cursor=str(chunk.position),
            more=chunk.more,
            ended=ended,
            missed_bytes=0 if wanted is None else max(0, chunk.start - wanted),
        )

    def end_waits(self) -> None:
        """Answer all who follow: the node stops."""
        self._stopping = True
        for bell in self._bells.values():
            bell.ring()

    async def _changed(self, record: PodRecord, bell: asyncio.Event) -> None:
        """Wait until there is more, or something became of the pod's containers since *record* was looked at.

        Not for what happened meanwhile: the disk was waited for in between, and nobody listened.
        """
        pod_id = record.pod_id
        if self._stopping:
            raise UnavailableError("The node is stopping; ask again when it is back.")
        self.followers += 1
        try:
            with self._ledger.listening(pod_id, lambda: self._ring(pod_id)):
                if self._ledger.find(pod_id) is record:
                    await bell.wait()
        finally:
            self.followers -= 1

    def _find(self, pod_id: str, cid: str) -> ContainerRecord:
        return find_container(self._ledger.get(pod_id), cid)

    def _named(self, request: ContainerLogs) -> str:
        record = self._ledger.get(request.pod_id)
        if request.container_id is not None:
            return container_id(find_container(record, request.container_id))
        ids = [container_id(c) for c in record.containers]
        if not ids:
            raise NotFoundError(f"Pod {request.pod_id} has no container.")
        if len(ids) > 1:
            raise InvalidArgumentError.field(
                "container_id", f"pod {request.pod_id} has several containers, name one of {', '.join(ids)}"
            )
        return ids[0]

    def _ended(self, pod_id: str, container: ContainerRecord, found: ContainerLog) -> bool:
        """Whether no more will come."""
        if container.state in CONTAINER_ALIVE or container.restarts.at is not None:
            return False  # its policy is about to start it again
        return container.state is ContainerState.READY or found.at_rest or pod_id not in self._pumping


def _begin(found: ContainerLog, request: ContainerLogs) -> int:
    """Where a first request begins."""
    if request.cursor is not None:
        return int(request.cursor)
    at = found.start if request.tail is None else found.tail(request.tail)
    return at if request.since is None else max(at, found.since(_ns(request.since)))


def _read(found: ContainerLog, position: int, max_bytes: int, until_ns: int | None) -> Chunk:
    try:
        return found.read(position, max_bytes=max_bytes, max_pieces=MAX_LOG_ENTRIES, until_ns=until_ns)
    except OSError as exc:
        raise StorageError(f"A log cannot be read: {exc.strerror}.") from exc


def _ns(moment: datetime) -> int:
    return int(moment.timestamp() * 1_000_000) * 1000


_STREAMS: dict[str, LogStream] = {"stdout": "stdout", "stderr": "stderr", "node": "node"}


def _entry(piece: Piece) -> LogEntry:
    return LogEntry(
        **dict(Blob.of(piece.data)),
        time=datetime.fromtimestamp(piece.time_ns // 1000 / 1_000_000, UTC),
        stream=_STREAMS[piece.kind],
    )
