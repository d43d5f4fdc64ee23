"""Durable commands as they are received: how often, and whether their outcome has been told.

JetStream delivers at least once. This table makes one outcome event of that: event and mark are one
transaction, and a message that has its mark is only acknowledged.
"""

from __future__ import annotations

from dataclasses import dataclass

from vcnode.models.audit import AuditRecord
from vcnode.models.base import JsonObject
from vcnode.models.events import EventKind
from vcnode.pods.store import Store, Tx
from vcnode.pods.trail import tell

PRUNE_EVERY = 256
"""Old entries are removed once per so many outcomes."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What is known of a message."""

    deliveries: int
    """How often it was begun, this time included; less those times when it was undone in order."""
    outcome: str | None
    """Kind of the event that told its outcome; None: it has none yet."""


class Received:
    """The table.

    Args:
        store: The database.
        max_entries: Outcomes kept; the oldest go first.
        max_age_s: Age in seconds (see `Ages`) at which an entry is forgotten; longer than any acknowledgement
            can be late.
        mock: Whether the node only pretends to run VMs.
    """

    def __init__(self, store: Store, *, max_entries: int, max_age_s: float, mock: bool) -> None:
        self._store = store
        self._max_entries = max_entries
        self._max_age_s = max_age_s
        self._mock = mock
        self._count = 0

    async def receive(self, message: str) -> Receipt:
        """Count a delivery of *message*, committed before anything is done about it.

        Raises:
            ResourceExhaustedError, StorageError: The database cannot be written; not counted.
        """

        def receive(tx: Tx) -> Receipt:
            row = tx.execute(
                "INSERT INTO received (message, deliveries, received_at) VALUES (?, 1, ?) "
                "ON CONFLICT (message) DO UPDATE SET deliveries = deliveries + 1 "
                "RETURNING deliveries, outcome",
                (message, self._store.ages()),
            ).fetchone()
            return Receipt(*row)

        return await self._store.write(receive)

    async def give_back(self, message: str) -> None:
        """Take back the last delivery of *message*: what was begun has been undone.

        Raises:
            ResourceExhaustedError, StorageError: The database cannot be written; it stays counted.
        """

        def give_back(tx: Tx) -> None:
            tx.execute(
                "UPDATE received SET deliveries = deliveries - 1 WHERE message = ? AND outcome IS NULL",
                (message,),
            )

        await self._store.write(give_back)

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
        """Emit the outcome of *message* as an event; no effect if it has been told before.

        *audit* is told along with it: what the journal has not told.

        Raises:
            ResourceExhaustedError, StorageError: The database cannot be written; neither event nor mark.
        """
        self._count += 1
        prune = self._count % PRUNE_EVERY == 0

        def conclude(tx: Tx) -> None:
            # Also of a message that is not there any more: it may have been pruned meanwhile.
            marked = tx.execute(
                "INSERT INTO received (message, deliveries, received_at, outcome) VALUES (?, 1, ?, ?) "
                "ON CONFLICT (message) DO UPDATE SET outcome = excluded.outcome WHERE outcome IS NULL",
                (message, self._store.ages(), kind.value),
            )
            if marked.rowcount:
                tx.emit(
                    kind,
                    f"command/{command_id}",
                    data,
                    time=self._store.clock(),
                    mock=self._mock,
                    command_id=command_id,
                    traceparent=traceparent,
                )
                if audit is not None:
                    tell(tx, audit, time=self._store.clock(), mock=self._mock)
            if prune:
                self._prune(tx)

        await self._store.write(conclude)

    def _prune(self, tx: Tx) -> None:
        oldest = self._store.ages() - self._max_age_s
        tx.execute("DELETE FROM received WHERE received_at < ?", (oldest,))
        tx.execute(
            "DELETE FROM received WHERE rowid IN (SELECT rowid FROM received WHERE outcome IS NOT NULL "
            "ORDER BY received_at DESC, rowid DESC LIMIT -1 OFFSET ?)",
            (self._max_entries,),
        )
