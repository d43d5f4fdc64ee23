"""The node's database: one writer thread, transactions as functions, snapshots for readers.

A transaction is a function that gets a `Tx`. It runs in the writer thread, so transactions never race, and
it sees what all earlier ones did. What waits together is committed together (one fsync), each in a savepoint
of its own: one that fails takes no other down. After the commit the new `View` replaces the old one as a
whole; readers take it without a lock and never touch the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from vcnode import aio
from vcnode.errors import ResourceExhaustedError, StorageError, UnavailableError, VcnodeError
from vcnode.models.base import JsonObject
from vcnode.models.events import Event, EventKind
from vcnode.models.node import ImageStatus
from vcnode.models.records import PodRecord
from vcnode.pods.ages import Ages, newest
from vcnode.pods.identity import Identity, read_identity, write_identity
from vcnode.pods.salvage import DamagedError, Rebuilt, finish_interrupted, rebuild
from vcnode.pods.schema import migrate

log = logging.getLogger(__name__)

T = TypeVar("T")

WRITE_LIMIT_S = 30.0
"""Seconds after which a caller no longer waits for the disk; the transaction may still go through."""
BUSY_TIMEOUT_MS = 2000
"""Milliseconds to wait for another process that has the database open."""


@dataclass(frozen=True, slots=True)
class View:
    """What was committed, at one moment. Never changed; a commit makes a new one."""

    pods: Mapping[str, PodRecord] = field(default_factory=dict)
    """By id, in the order of creation."""
    images: Mapping[str, ImageStatus] = field(default_factory=dict)
    """By name; ``in_use`` is not kept here."""
    sequence: int = 0
    """Sequence of the newest event."""
    unpublished_count: int = 0
    """Events in the outbox that JetStream has not acknowledged."""


class Tx:
    """One transaction; valid only inside the function that got it, in the writer thread."""

    def __init__(self, connection: sqlite3.Connection, base: View, *, node_name: str, epoch: int) -> None:
        self._connection = connection
        self._node_name = node_name
        self._epoch = epoch
        self._pods = dict(base.pods)
        self._images = dict(base.images)
        self._sequence = base.sequence
        self.unpublished_count = base.unpublished_count

    @property
    def sequence(self) -> int:
        """Sequence of the newest event, those of this transaction included; 0 before the first."""
        return self._sequence

    @property
    def pods(self) -> Mapping[str, PodRecord]:
        """All pods, changes of this transaction included."""
        return self._pods

    @property
    def images(self) -> Mapping[str, ImageStatus]:
        """All images, changes of this transaction included."""
        return self._images

    def view(self) -> View:
        """What readers will see once this is committed."""
        return View(self._pods, self._images, self._sequence, self.unpublished_count)

    def execute(self, sql: str, parameters: tuple[object, ...] = ()) -> sqlite3.Cursor:
        """Run one statement (tables ``journal`` and ``outbox``; the others have methods here)."""
        return self._connection.execute(sql, parameters)

    def save_pod(self, record: PodRecord) -> None:
        """Insert or replace a pod's record."""
        self.execute(
            "INSERT INTO pods (pod_id, state, revision, record) VALUES (?, ?, ?, ?) ON CONFLICT (pod_id) "
            "DO UPDATE SET state = excluded.state, revision = excluded.revision, record = excluded.record",
            (record.pod_id, record.state.value, record.revision, record.model_dump_json()),
        )
        self._pods[record.pod_id] = record

    def forget_pod(self, pod_id: str) -> None:
        """Delete a pod's record, if there is one."""
        self.execute("DELETE FROM pods WHERE pod_id = ?", (pod_id,))
        self._pods.pop(pod_id, None)

    def save_image(self, image: ImageStatus) -> None:
        """Insert or replace an image."""
        self.execute(
            "INSERT OR REPLACE INTO images (name, digest, status) VALUES (?, ?, ?)",
            (image.name, image.digest, image.model_dump_json()),
        )
        self._images[image.name] = image

    def forget_image(self, name: str) -> None:
        """Delete an image, if there is one."""
        self.execute("DELETE FROM images WHERE name = ?", (name,))
        self._images.pop(name, None)

    def emit(
        self,
        kind: EventKind,
        subject: str,
        data: JsonObject,
        *,
        time: datetime,
        mock: bool = False,
        command_id: str | None = None,
        traceparent: str | None = None,
    ) -> Event:
        """Put an event into the outbox under the next sequence number; see `Event` for the fields."""
        sequence = self._sequence + 1
        event = Event(
            id=f"{self._node_name}-{sequence}",
            source=f"/vcnode/{self._node_name}",
            type=f"vcnode.{kind.value}",
            subject=subject,
            time=time,
            sequence=str(sequence),
            epoch=self._epoch,
            mock=mock,
            commandid=command_id,
            traceparent=traceparent,
            data=data,
        )
        self.execute(
            "INSERT INTO outbox (sequence, event) VALUES (?, ?)", (sequence, event.model_dump_json())
        )
        self.execute("UPDATE meta SET value = ? WHERE key = 'sequence'", (str(sequence),))
        self._sequence = sequence
        self.unpublished_count += 1
        return event

    def continue_after(self, sequence: int) -> int:
        """Give the events that wait the numbers after *sequence*; how many got another one.

        For events that nobody has seen yet: numbers that were published stay what they are.
        """
        waiting = self.execute(
            "SELECT sequence, event FROM outbox WHERE published_at IS NULL ORDER BY sequence"
        ).fetchall()
        wanted = list(range(sequence + 1, sequence + 1 + len(waiting)))
        changed = [old for (old, _), new in zip(waiting, wanted, strict=True) if old != new]
        if changed:
            self.execute("DELETE FROM outbox WHERE published_at IS NULL OR sequence > ?", (sequence,))
            for (_, text), new in zip(waiting, wanted, strict=True):
                event = Event.model_validate_json(text).model_copy(
                    update={"id": f"{self._node_name}-{new}", "sequence": str(new)}
                )
                self.execute(
                    "INSERT INTO outbox (sequence, event) VALUES (?, ?)", (new, event.model_dump_json())
                )
        self._sequence = sequence + len(waiting)
        self.execute("UPDATE meta SET value = ? WHERE key = 'sequence'", (str(self._sequence),))
        return len(changed)


class _Job(Generic[T]):
    """A transaction that waits for the writer thread, and whoever waits for it."""

    def __init__(self, work: Callable[[Tx], T], future: asyncio.Future[T]) -> None:
        self.work = work
        self.future = future
        self.result: T
        self.error: BaseException | None = None

    def settle(self) -> None:
        """Hand over the outcome, in the loop's thread. The waiter may have given up."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


def translate(exc: sqlite3.Error) -> VcnodeError:
    """Say what a database error means to a caller."""
    name = getattr(exc, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return ResourceExhaustedError("The disk of the node's state directory is full; nothing was changed.")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageError(
            "Another process has the node's database open; run one node agent per state_dir.", sqlite=name
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return StorageError("The node's state directory cannot be written; nothing was changed.", sqlite=name)
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return DamagedError(
            "The node's database was found damaged, and nothing was changed; it is rebuilt now: try again.",
            sqlite=name,
        )
    return StorageError("The node's database failed; nothing was changed.", sqlite=name)


class Store:
    """The database of one node agent; made by `open`."""

    def __init__(
        self, path: Path, *, node_name: str, clock: Callable[[], datetime], ticks: Callable[[], float]
    ) -> None:
        self.path = path
        self.node_name = node_name
        self.clock = clock
        self._ticks = ticks
        self.ages = Ages(0.0, ticks)
        """By it what is kept grows old; for the writer thread."""
        self.epoch = 0
        """Grows with each `open` on the same file."""
        self.identity = ""
        """Made with the file; tells it from any other of the same node name."""
        self.rebuilt: Rebuilt | None = None
        """Set when the database was found damaged and a new one took its place; the last time it was."""
        self._told: Rebuilt | None = None
        self.mended = asyncio.Event()
        """Set when that has happened to the open database; whoever waits for it clears it."""
        self.changed = asyncio.Event()
        """Set by each commit; whoever waits for it clears it."""
        self.has_unpublished = asyncio.Event()
        """Set while the outbox holds an event that is not published."""
        self._view = View()
        self._damage: str | None = None
        """What is wrong with the database, until it is rebuilt. For the writer thread."""
        self._jobs: deque[_Job[Any]] = deque()
        self._jobs_lock = threading.Lock()
        self._closed = False
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vcnode-store")
        self._connection: sqlite3.Connection | None = None

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        node_name: str,
        clock: Callable[[], datetime],
        ticks: Callable[[], float] = time.monotonic,
    ) -> Store:
        """Open or make the database, migrate it, and count the epoch up.

        A damaged one is kept aside, and a new one made with what could be read of it: see `rebuilt`.

        Args:
            path: The file; its directory is made if missing.
            node_name: Must be the name that the database was made with: event ids depend on it.
            clock: Gives the current time, with its zone.
            ticks: Seconds that only grow.

        Raises:
            StorageError: Not writable, open elsewhere, of a newer version, or of another node.
            ResourceExhaustedError: The disk is full.
        """
        store = cls(path, node_name=node_name, clock=clock, ticks=ticks)
        try:
            await store._in_thread(store._open)
        except BaseException:
            await store.close()
            raise
        store._told = store.rebuilt
        store._publish()
        return store

    @property
    def pods(self) -> Mapping[str, PodRecord]:
        """All committed records, in the order of creation. A snapshot: it does not change."""
        return self._view.pods

    @property
    def images(self) -> Mapping[str, ImageStatus]:
        """All committed images. A snapshot."""
        return self._view.images

    @property
    def sequence(self) -> int:
        """Sequence of the newest event."""
        return self._view.sequence

    @property
    def unpublished_count(self) -> int:
        """Events that JetStream has not acknowledged."""
        return self._view.unpublished_count

    async def write(self, work: Callable[[Tx], T]) -> T:
        """Run *work* as one transaction; when this returns, it is on the disk.

        An exception out of *work* rolls it back and comes out here. A cancellation is held back until the
        outcome is certain; the transaction may then have been committed.

        Raises:
            StorageError: The database cannot be written; nothing of this transaction was kept. After
                `WRITE_LIMIT_S` seconds without an answer of the disk it is raised, too, and the outcome open
                (detail ``settled``: false).
            DamagedError: It is damaged; nothing of this was kept, and by now it is rebuilt, if it can be.
            ResourceExhaustedError: The disk is full.
            UnavailableError: The store is closed.
        """
        loop = asyncio.get_running_loop()
        job = _Job(work, loop.create_future())
        with self._jobs_lock:
            if self._closed:
                raise UnavailableError("The node agent is stopping.")
            self._jobs.append(job)
            self._executor.submit(self._drain, loop)
        return await self._settled(job.future)

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a read-only *query* between transactions. Raises as `write`."""

        def run() -> T:
            try:
                with _translated():
                    return query(self._usable())
            except DamagedError as exc:
                self._mend(exc.message)
                raise

        if self._closed:
            raise UnavailableError("The node agent is stopping.")
        try:
            return await self._in_thread(run)
        except DamagedError:
            self._publish()
            raise

    async def close(self) -> None:
        """Finish the transactions that wait, then close the file. Idempotent."""
        with self._jobs_lock:
            already, self._closed = self._closed, True
        if not already:
            await self._in_thread(self._close)
            self._executor.shutdown(wait=False)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await self._settled(asyncio.get_running_loop().run_in_executor(self._executor, call))

    async def _settled(self, future: asyncio.Future[T]) -> T:
        async def result() -> T:
            return await future

        try:
            return await aio.finish(result(), timeout_s=WRITE_LIMIT_S)
        except TimeoutError as exc:
            raise StorageError(
                f"The disk of the node's state directory has not answered for {WRITE_LIMIT_S:.0f} s.",
                settled=False,
            ) from exc

    # ---- in the writer thread ------------------------------------------------------------------------

    def _usable(self) -> sqlite3.Connection:
        """The connection; a rebuild that failed, for want of room perhaps, is tried again first."""
        if self._damage is not None:
            self._mend(self._damage)
        if self._damage is not None:
            raise StorageError(
                "The node's database is damaged and cannot be rebuilt; the node's log says why."
            )
        return self._open_connection()

    def _mend(self, reason: str) -> None:
        """Put a new database in the place of the open one, which is damaged.

        Pods, images and the last sequence are those of the view: the last that was committed, whatever can
        still be read. Failures are logged; the next transaction tries again.
        """
        self._damage = reason
        try:
            with contextlib.suppress(VcnodeError):
                self._close()
            self._connection = None
            if self.path.exists():
                self._rebuild(reason)
            self._connect(known=self._view)
        except VcnodeError:
            log.exception("The damaged database cannot be rebuilt now")
            return
        self._damage = None

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StorageError("The node's database is not open.")
        return self._connection

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            finish_interrupted(self.path)
        except OSError as exc:
            raise StorageError(f"The state directory {self.path.parent} cannot be made.") from exc
        try:
            self._connect()
        except DamagedError as exc:
            self._close()
            self._rebuild(exc.message)
            self._connect()

    def _rebuild(self, reason: str) -> None:
        with _translated():
            try:
                self.rebuilt = rebuild(self.path, reason, node_name=self.node_name, now=self.clock())
            except OSError as exc:
                raise StorageError(
                    f"The damaged database {self.path} cannot be replaced: {exc.strerror}."
                ) from exc
        log.error(
            "The database was damaged (%s) and is kept as %s; carried over: %s",
            reason,
            self.rebuilt.kept_aside,
            self.rebuilt.carried,
        )

    def _connect(self, known: View | None = None) -> None:
        """Open the file. With *known*, in the same life as before, whose truth that is."""
        with _translated():
            connection = sqlite3.connect(self.path, isolation_level=None)
            self._connection = connection
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS:d}")
            # One owner: the lock is kept until close, so a second node agent is refused instead of mixed in.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise DamagedError(f"The database {self.path} is damaged: {verdict}.")
            with _transaction(connection):
                migrate(connection)
                epoch = self._claim(connection)
                if known is None:
                    self.epoch = epoch
                    start = newest(connection)
                    self.ages = Ages(self.clock().timestamp() if start is None else start, self._ticks)
                else:
                    _restore(connection, known, epoch=self.epoch)
                self._view = _load(connection)
            write_identity(
                self._identity_file,
                Identity(node=self.node_name, identity=self.identity, epoch=self.epoch),
            )

    @property
    def _identity_file(self) -> Path:
        return self.path.with_suffix(".json")

    def _claim(self, connection: sqlite3.Connection) -> int:
        """Check that the database is this node's, and count its epoch up."""
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        if (owner := meta.get("node_name", self.node_name)) != self.node_name:
            raise StorageError(
                f"The database {self.path} belongs to node {owner}, this is {self.node_name}; "
                "give each node its own state_dir, or set node_name back.",
                node=owner,
            )
        kept = read_identity(self._identity_file, self.node_name)
        epoch = max(int(meta.get("epoch", "0")), 0 if kept is None else kept.epoch) + 1
        self.identity = meta.get("identity") or (uuid.uuid4().hex if kept is None else kept.identity)
        rows = {
            "node_name": self.node_name,
            "epoch": str(epoch),
            "sequence": meta.get("sequence", "0"),
            "identity": self.identity,
        }
        connection.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", list(rows.items()))
        return epoch

    def _drain(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._jobs_lock:
            jobs = list(self._jobs)
            self._jobs.clear()
        if jobs:
            self._commit(jobs)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._settle, jobs)

    def _commit(self, jobs: list[_Job[Any]]) -> None:
        view = self._view
        try:
            with _translated():
                connection = self._usable()
                with _transaction(connection):
                    for job in jobs:
                        view = self._run(connection, job, view)
        except BaseException as exc:
            if isinstance(exc, DamagedError):
                self._mend(exc.message)
            for job in jobs:
                job.error = job.error or exc
        else:
            self._view = view

    def _run(self, connection: sqlite3.Connection, job: _Job[Any], view: View) -> View:
        """Run one job in a savepoint; the view after it."""
        connection.execute("SAVEPOINT job")
        tx = Tx(connection, view, node_name=self.node_name, epoch=self.epoch)
        try:
            job.result = job.work(tx)
        except sqlite3.Error:
            # A full disk and the like may have rolled back the whole transaction already: all of it fails.
            raise
        except BaseException as exc:
            job.error = exc
            connection.execute("ROLLBACK TO job")
            connection.execute("RELEASE job")
            return view
        connection.execute("RELEASE job")
        return tx.view()

    def _close(self) -> None:
        if self._connection is not None:
            with _translated():
                self._connection.close()
            self._connection = None

    # ---- in the loop's thread ------------------------------------------------------------------------

    def _settle(self, jobs: list[_Job[Any]]) -> None:
        self._publish()
        for job in jobs:
            job.settle()

    def _publish(self) -> None:
        self.changed.set()
        if self._told is not self.rebuilt:
            self._told = self.rebuilt
            self.mended.set()
        if self._view.unpublished_count:
            self.has_unpublished.set()
        else:
            self.has_unpublished.clear()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise translate(exc) from exc


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _restore(connection: sqlite3.Connection, known: View, *, epoch: int) -> None:
    """Let a database that was rebuilt say what *known* says; events that it does not count were never."""
    connection.execute("DELETE FROM pods")
    connection.execute("DELETE FROM images")
    connection.execute("DELETE FROM outbox WHERE sequence > ?", (known.sequence,))
    tx = Tx(connection, View(), node_name="", epoch=epoch)
    for record in known.pods.values():
        tx.save_pod(record)
    for image in known.images.values():
        tx.save_image(image)
    rows = {"epoch": str(epoch), "sequence": str(known.sequence)}
    connection.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", list(rows.items()))


def _load(connection: sqlite3.Connection) -> View:
    """Read everything that readers need.

    Raises:
        DamagedError: A record cannot be read.
    """
    pods: dict[str, PodRecord] = {}
    images: dict[str, ImageStatus] = {}
    try:
        for pod_id, text in connection.execute("SELECT pod_id, record FROM pods ORDER BY rowid"):
            pods[pod_id] = PodRecord.model_validate_json(text)
        for name, text in connection.execute("SELECT name, status FROM images ORDER BY name"):
            images[name] = ImageStatus.model_validate_json(text)
    except ValueError as exc:
        raise DamagedError("The node's database holds a record that cannot be read.") from exc
    (sequence,) = connection.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()
    (unpublished,) = connection.execute("SELECT count(*) FROM outbox WHERE published_at IS NULL").fetchone()
    return View(pods, images, int(sequence), unpublished)
