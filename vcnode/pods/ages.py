"""The clock by which what is kept grows old."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable


class Ages:
    """Seconds that pass while the node agent runs; whatever happens to the host's clock, they only grow.

    The time of day can jump by years. By it, replies would be forgotten at once that keep commands from
    running twice. Here nothing passes but what this process has seen pass; across a restart it goes on where
    the newest of what is kept has been put, so that time without a node agent makes nothing older.

    Args:
        start: Where it goes on.
        ticks: Seconds that only grow, from wherever.
    """

    def __init__(self, start: float, ticks: Callable[[], float]) -> None:
        self._ticks = ticks
        self._offset = start - ticks()

    def __call__(self) -> float:
        """The present moment; close to seconds since 1970 in a new database, and of no other meaning."""
        return self._offset + self._ticks()


def newest(connection: sqlite3.Connection) -> float | None:
    """The last moment that the database knows of; None in a new one."""
    (found,) = connection.execute(
        "SELECT max(moment) FROM (SELECT max(finished_at) AS moment FROM journal"
        " UNION ALL SELECT max(received_at) FROM received UNION ALL SELECT max(kept_since) FROM outbox)"
    ).fetchone()
    return None if found is None else float(found)
