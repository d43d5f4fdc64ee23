"""The journal: every command that changes something, and what was answered.

A command is committed here before its first side effect, and its reply before it is sent; so the same
command, sent again, gets the same reply, also after a restart.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from vcnode.errors import AbortedError, AlreadyExistsError, ResourceExhaustedError
from vcnode.models.audit import AuditRecord
from vcnode.models.commands import COMMANDS
from vcnode.models.events import Event
from vcnode.models.records import PodRecord
from vcnode.pods.store import Store, Tx
from vcnode.pods.stored import Stored
from vcnode.pods.trail import concluded, tell

PRUNE_EVERY = 256
"""The journal is pruned once per so many finished commands; it may exceed its bound by as many."""
_LAST_EVENT = {
    "pod.create": "pod.created",
    "pod.start": "pod.started",
    "pod.run": "pod.started",
    "pod.delete": "pod.deleted",
    "container.create": "container.created",
    "container.start": "container.started",
    "container.delete": "container.deleted",
}
"""Commands that are done once this event of theirs is committed, and have its data as their reply."""
RESTARTED = "The node restarted while this command ran; ask for the pod's status."


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A command that was begun and has no reply."""

    command_id: str
    verb: str
    digest: str
    started_at: float
    """Seconds since 1970."""
    after_sequence: int
    """Sequence of the newest event before it."""


class Journal:
    """Commands and their replies, in the node's database.

    Args:
        store: The database.
        max_entries: Replies kept; the oldest go first.
        max_age_s: Age in seconds (see `Ages`) at which a reply is forgotten.
        max_unpublished: At so many unpublished events no command is begun.
        mock: Whether the node only pretends; marks the events.
    """

    def __init__(
        self,
        store: Store,
        *,
        max_entries: int,
        max_age_s: float,
        max_unpublished: int,
        mock: bool = False,
    ) -> None:
        self._store = store
        self._mock = mock
        self._max_entries = max_entries
        self._max_age_s = max_age_s
        self._max_unpublished = max_unpublished
        self._finished_count = 0

    async def begin(
        self, command_id: str, verb: str, digest: str, audit: AuditRecord | None = None
    ) -> Stored | None:
        """Note a command, or find the reply that it got before.

        Args:
            command_id: Its idempotency key.
            verb: What it is.
            digest: Digest of its body.
            audit: What is to be told of it, once, together with its outcome; None: nothing.

        Returns:
            None: it is new, and committed as in progress. Otherwise its reply.

        Raises:
            AlreadyExistsError: The id was used for another verb or body.
            AbortedError: This very command is in progress.
            ResourceExhaustedError: Too many events wait for JetStream, or the disk is full; not begun.
            StorageError: The database cannot be written; not begun.
        """

        def begin(tx: Tx) -> Stored | None:
            row = tx.execute(
                "SELECT verb, digest, finished_at, ok, body, code, number FROM journal WHERE command_id = ?",
                (command_id,),
            ).fetchone()
            if row is not None:
                return _earlier(command_id, verb, digest, row)
            if tx.unpublished_count >= self._max_unpublished:
                raise ResourceExhaustedError(
                    f"{tx.unpublished_count} events wait to be published; is JetStream reachable?",
                    unpublished=tx.unpublished_count,
                )
            tx.execute(
                "INSERT INTO journal (command_id, verb, digest, started_at, after_sequence, audit) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    command_id,
                    verb,
                    digest,
                    self._store.clock().timestamp(),
                    tx.sequence,
                    None if audit is None else audit.model_dump_json(),
                ),
            )
            return None

        return await self._store.write(begin)

    async def finish(self, command_id: str, stored: Stored) -> None:
        """Keep the reply of a command. Has no effect if it has one already.

        Raises:
            ResourceExhaustedError, StorageError: It could not be kept; after a restart the command counts
                as unfinished.
        """
        self._finished_count += 1
        prune = self._finished_count % PRUNE_EVERY == 0

        def finish(tx: Tx) -> None:
            self._finish(tx, command_id, stored)
            if prune:
                self._prune(tx)

        await self._store.write(finish)

    async def forget(self, command_id: str) -> None:
        """Drop a command that had no effect, so that it may be sent again. Its reply, if any, stays.

        Raises:
            ResourceExhaustedError, StorageError: The database cannot be written.
        """

        def forget(tx: Tx) -> None:
            tx.execute("DELETE FROM journal WHERE command_id = ? AND finished_at IS NULL", (command_id,))

        await self._store.write(forget)

    async def unfinished(self) -> Sequence[Unfinished]:
        """Commands without a reply, oldest first."""

        def query(connection: sqlite3.Connection) -> list[Unfinished]:
            rows = connection.execute(
                "SELECT command_id, verb, digest, started_at, after_sequence FROM journal "
                "WHERE finished_at IS NULL "
                "ORDER BY started_at, rowid"
            )
            return [Unfinished(*row) for row in rows]

        return await self._store.read(query)

    async def fail_unfinished(self) -> Sequence[Unfinished]:
        """Answer what an earlier process left unfinished, before any command is taken.

        Call it when the pods have been recovered. What its events show to be done is answered as done;
        anything else as failed, with the events that it caused and what has become of their pods.
        """
        found = await self.unfinished()

        def fail(tx: Tx) -> None:
            for entry in found:
                # Not those of an earlier command of this id, whose reply is forgotten.
                rows = tx.execute(
                    "SELECT event FROM outbox WHERE sequence > ? AND "
                    "json_extract(event, '$.commandid') = ? ORDER BY sequence",
                    (entry.after_sequence, entry.command_id),
                )
                events = [Event.model_validate_json(text) for (text,) in rows]
                stored = _done(entry, events) or _restarted(entry, events, tx.pods)
                self._finish(tx, entry.command_id, stored)
            self._prune(tx)

        await self._store.write(fail)
        return found

    def _finish(self, tx: Tx, command_id: str, stored: Stored) -> None:
        row = tx.execute(
            "UPDATE journal SET finished_at = ?, ok = ?, code = ?, number = ?, body = ? "
            "WHERE command_id = ? AND finished_at IS NULL RETURNING audit",
            (self._store.ages(), int(stored.ok), stored.code, stored.number, stored.body, command_id),
        ).fetchone()
        if row is not None and row[0] is not None:
            record = AuditRecord.model_validate_json(row[0])
            tell(tx, concluded(record, stored), time=self._store.clock(), mock=self._mock)

    def _prune(self, tx: Tx) -> None:
        tx.execute("DELETE FROM journal WHERE finished_at < ?", (self._store.ages() - self._max_age_s,))
        tx.execute(
            "DELETE FROM journal WHERE rowid IN (SELECT rowid FROM journal WHERE finished_at IS NOT NULL "
            "ORDER BY finished_at DESC, rowid DESC LIMIT -1 OFFSET ?)",
            (self._max_entries,),
        )


def _earlier(command_id: str, verb: str, digest: str, row: tuple[object, ...]) -> Stored:
    old_verb, old_digest, finished_at, ok, body, code, number = row
    if (old_verb, old_digest) != (verb, digest):
        raise AlreadyExistsError(
            f"Command id {command_id} was used for another {old_verb}; give each command its own id.",
            command_id=command_id,
            verb=old_verb,
        )
    if finished_at is None:
        raise AbortedError(f"Command {command_id} is still in progress.", command_id=command_id)
    return Stored(
        ok=bool(ok),
        body=body if isinstance(body, bytes) else b"",
        code=code if isinstance(code, str) else None,
        number=number if isinstance(number, int) else None,
    )


def _done(entry: Unfinished, events: Sequence[Event]) -> Stored | None:
    """The reply of a command whose last event shows that it was done; None if there is no such event."""
    last = _LAST_EVENT.get(entry.verb)
    found = next((event for event in reversed(events) if event.kind == last), None)
    if found is None:
        return None
    names = dict(zip(("pod_id", "container_id"), found.subject.split("/"), strict=False))
    try:
        reply = COMMANDS[entry.verb].reply.model_validate({**found.data, **names, "existed": True})
    except ValidationError:
        return None  # an event of an older version
    return Stored(ok=True, body=reply.model_dump_json().encode())


def _restarted(entry: Unfinished, events: Sequence[Event], pods: Mapping[str, PodRecord]) -> Stored:
    touched = {
        event.subject.split("/")[0] for event in events if event.kind.startswith(("pod.", "container."))
    }
    error = {
        "code": "internal",
        "message": RESTARTED,
        "details": {
            "command_id": entry.command_id,
            "verb": entry.verb,
            "restarted": True,
            "events": [event.kind for event in events],
            "pods": {pod: pods[pod].state.value if pod in pods else "absent" for pod in sorted(touched)},
        },
        "retryable": False,
        "error_id": None,
    }
    return Stored(ok=False, body=json.dumps(error).encode(), code="internal", number=500)
