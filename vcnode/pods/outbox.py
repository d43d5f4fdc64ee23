"""The outbox: events between the transaction that made them and JetStream's acknowledgement."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence

from vcnode.models.events import Event
from vcnode.pods.store import Store, Tx

PRUNE_EVERY = 256
"""Old events are removed once per so many acknowledgements."""


class Outbox:
    """Events that wait to be published, and those published lately.

    Args:
        store: The database.
        retention_s: Seconds (see `Ages`) for which a published event is kept, in case JetStream loses it.
    """

    def __init__(self, store: Store, *, retention_s: float) -> None:
        self._store = store
        self._retention_s = retention_s
        self._marks_count = 0

    @property
    def last_sequence(self) -> int:
        """Sequence of the newest event, published or not; 0 before the first."""
        return self._store.sequence

    @property
    def unpublished_count(self) -> int:
        """How many events wait."""
        return self._store.unpublished_count

    async def unpublished(self, limit: int) -> Sequence[Event]:
        """The oldest events that wait, in order, at most *limit*."""
        return await self._events(
            "SELECT event FROM outbox WHERE published_at IS NULL ORDER BY sequence LIMIT ?", (limit,)
        )

    async def since(self, sequence: int, limit: int) -> Sequence[Event]:
        """Events after *sequence* that are still kept, published or not, in order, at most *limit*."""
        return await self._events(
            "SELECT event FROM outbox WHERE sequence > ? ORDER BY sequence LIMIT ?", (sequence, limit)
        )

    async def mark_published(self, sequence: int) -> None:
        """Note that JetStream has acknowledged every event up to and including *sequence*. Idempotent."""
        self._marks_count += 1
        prune = self._marks_count % PRUNE_EVERY == 0

        def mark(tx: Tx) -> None:
            marked = tx.execute(
                "UPDATE outbox SET published_at = ?, kept_since = ? "
                "WHERE sequence <= ? AND published_at IS NULL",
                (self._store.clock().timestamp(), self._store.ages(), sequence),
            )
            tx.unpublished_count -= marked.rowcount
            if prune:
                self._prune(tx)

        await self._store.write(mark)

    async def rewind(self, sequence: int, *, within_s: float, published_after: float = 0.0) -> int:
        """Have events published again that JetStream has lost.

        Args:
            sequence: The last that it still has; only later ones.
            within_s: Only those that were published in the last so many seconds (see `Ages`).
            published_after: Seconds since 1970: only those that were published later than that.

        Returns:
            How many there are; those older than the retention time are not kept and cannot come again.
        """

        def rewind(tx: Tx) -> int:
            lost = tx.execute(
                "UPDATE outbox SET published_at = NULL "
                "WHERE sequence > ? AND published_at > ? AND kept_since > ?",
                (sequence, published_after, self._store.ages() - within_s),
            )
            tx.unpublished_count += lost.rowcount
            return lost.rowcount

        return await self._store.write(rewind)

    async def continue_after(self, sequence: int, *, published: Collection[str]) -> int:
        """Let the events that wait follow on the stream's last one, of a database that this node has lost.

        Args:
            sequence: That of the stream's last event.
            published: Message ids of events that the stream has; those are marked as published.

        Returns:
            How many events got another number.
        """

        def follow(tx: Tx) -> int:
            rows = tx.execute("SELECT sequence, event FROM outbox WHERE published_at IS NULL").fetchall()
            for number, text in rows:
                if Event.model_validate_json(text).message_id in published:
                    tx.execute(
                        "UPDATE outbox SET published_at = ?, kept_since = ? WHERE sequence = ?",
                        (self._store.clock().timestamp(), self._store.ages(), number),
                    )
                    tx.unpublished_count -= 1
            return tx.continue_after(sequence)

        return await self._store.write(follow)

    async def find(self, sequence: int) -> Event | None:
        """The event of this sequence, if it is still kept."""
        found = await self._events("SELECT event FROM outbox WHERE sequence = ?", (sequence,))
        return found[0] if found else None

    async def oldest(self) -> int:
        """Sequence of the oldest event that is still kept; one more than the newest if none is."""

        def query(connection: sqlite3.Connection) -> int:
            (sequence,) = connection.execute("SELECT min(sequence) FROM outbox").fetchone()
            return self.last_sequence + 1 if sequence is None else int(sequence)

        return await self._store.read(query)

    async def prune(self) -> None:
        """Remove published events older than the retention time."""

        def prune(tx: Tx) -> None:
            self._prune(tx)

        await self._store.write(prune)

    def _prune(self, tx: Tx) -> None:
        oldest = self._store.ages() - self._retention_s
        tx.execute("DELETE FROM outbox WHERE published_at IS NOT NULL AND kept_since < ?", (oldest,))

    async def wait(self) -> None:
        """Wait until there is an event to publish; returns at once if there is one."""
        await self._store.has_unpublished.wait()

    async def _events(self, sql: str, parameters: tuple[int, ...]) -> Sequence[Event]:
        def query(connection: sqlite3.Connection) -> list[str]:
            return [row[0] for row in connection.execute(sql, parameters)]

        return [Event.model_validate_json(text) for text in await self._store.read(query)]
