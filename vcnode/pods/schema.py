"""The database's tables, and how an older database becomes a newer one."""

from __future__ import annotations

import sqlite3

from vcnode.errors import StorageError

_VERSION_1 = (
    """CREATE TABLE meta (
        key TEXT PRIMARY KEY,
        value TEXT NOT NULL
    )""",
    # rowid keeps the order of creation; state and revision are copies of what the record holds
    """CREATE TABLE pods (
        pod_id TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        revision INTEGER NOT NULL,
        record TEXT NOT NULL
    )""",
    """CREATE TABLE images (
        name TEXT PRIMARY KEY,
        digest TEXT NOT NULL,
        status TEXT NOT NULL
    )""",
    # finished_at IS NULL: in progress. started_at is in seconds since 1970, finished_at by `pods.ages`.
    """CREATE TABLE journal (
        command_id TEXT PRIMARY KEY,
        verb TEXT NOT NULL,
        digest TEXT NOT NULL,
        started_at REAL NOT NULL,
        finished_at REAL,
        ok INTEGER,
        code TEXT,
        number INTEGER,
        body BLOB
    )""",
    "CREATE INDEX journal_finished ON journal (finished_at)",
    # published_at, in seconds since 1970, IS NULL: still to be published
    """CREATE TABLE outbox (
        sequence INTEGER PRIMARY KEY,
        event TEXT NOT NULL,
        published_at REAL
    )""",
    "CREATE INDEX outbox_published ON outbox (published_at)",
)

_VERSION_2 = (
    # durable commands; outcome is the kind of the event that told how it ended, NULL until then; received_at
    # is by `pods.ages`
    """CREATE TABLE received (
        message TEXT PRIMARY KEY,
        deliveries INTEGER NOT NULL,
        outcome TEXT,
        received_at REAL NOT NULL
    )""",
    "CREATE INDEX received_at ON received (received_at)",
)

_VERSION_3 = (
    # what the audit event of a command will say, until its outcome is known; NULL: it has none
    "ALTER TABLE journal ADD COLUMN audit TEXT",
)

_VERSION_4 = (
    # sequence of the newest event when the command was begun: what is older is none of its doing
    "ALTER TABLE journal ADD COLUMN after_sequence INTEGER NOT NULL DEFAULT 0",
    # when it was published by `pods.ages`, which no jump of the clock makes old
    "ALTER TABLE outbox ADD COLUMN kept_since REAL",
    "UPDATE outbox SET kept_since = published_at",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2, _VERSION_3, _VERSION_4)
"""Statements that lead from version n to n + 1; only ever appended to."""


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the database to the newest version, inside the caller's transaction.

    Raises:
        StorageError: A newer vcnode has written it.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise StorageError(
            f"The database has version {version}; this vcnode knows up to {len(MIGRATIONS)}. "
            "Run the newer vcnode again, or give this one another state_dir.",
            version=version,
        )
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS):d}")
