"""A damaged database is kept aside, and a new one takes its place with all that could still be read of it.

The new one is finished beside the old one before that is moved away: a crash in between loses nothing.
Blocking; for the store's own thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from vcnode.errors import StorageError
from vcnode.models.events import Event
from vcnode.models.node import ImageStatus
from vcnode.models.records import PodRecord
from vcnode.pods.schema import migrate

log = logging.getLogger(__name__)

MAX_KEPT = 5
"""Damaged databases kept; the oldest go first."""
_BESIDE = ("", "-wal", "-shm")
_TABLES: dict[str, tuple[int, type[BaseModel]] | None] = {
    "pods": (3, PodRecord),
    "images": (2, ImageStatus),
    "outbox": (1, Event),
    "journal": None,
    "received": None,
}
"""What is carried over; of some, the column that holds a model and must be readable."""


class DamagedError(StorageError):
    """The database is no database, is torn, or holds what cannot be read."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of a damaged database."""

    reason: str
    """What was wrong with it."""
    kept_aside: str
    """Path of the damaged one."""
    carried: dict[str, int]
    """Rows that could be read and are in the new one, by table."""


def damaged_files(path: Path) -> list[Path]:
    """The damaged databases that were kept aside of *path*, oldest first."""
    found = path.parent.glob(f"{path.name}.damaged-*")
    return sorted(file for file in found if not file.name.endswith(_BESIDE[1:]))


def finish_interrupted(path: Path) -> None:
    """Do what a `rebuild` left undone that was killed. Raises OSError."""
    fresh = _fresh(path)
    if fresh.exists() and not path.exists():
        fresh.rename(path)
    _remove(fresh)


def rebuild(path: Path, reason: str, *, node_name: str, now: datetime) -> Rebuilt:
    """Put a new database in the place of the damaged one at *path*.

    Raises:
        OSError, sqlite3.Error: There is no room, or no permission; everything is as it was.
    """
    fresh = _fresh(path)
    _remove(fresh)
    try:
        with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("BEGIN IMMEDIATE")
            migrate(connection)
            carried = _carry_over(path, connection, node_name)
            connection.execute("COMMIT")
        aside = path.with_name(f"{path.name}.damaged-{now:%Y%m%dT%H%M%S}")
        for suffix in _BESIDE:
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
        fresh.rename(path)
        _sync(path.parent)
    except BaseException:
        if path.exists():
            _remove(fresh)
        raise
    for old in damaged_files(path)[:-MAX_KEPT]:
        _remove(old)
    return Rebuilt(reason, str(aside), carried)


def _fresh(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _remove(path: Path) -> None:
    for suffix in (*_BESIDE, "-journal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _carry_over(path: Path, into: sqlite3.Connection, node_name: str) -> dict[str, int]:
    """Copy what can be read of the database at *path*; how many rows that were, by table."""
    carried = dict.fromkeys(_TABLES, 0)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        meta = {str(key): str(value) for key, value in _rows(old, "meta", ("key", "value"))}
        if meta.get("node_name", node_name) != node_name:
            return carried
        for table, model in _TABLES.items():
            columns = _columns(into, table)
            there = _columns(old, table)
            columns = tuple(column for column in columns if column in there)
            if not columns:
                continue
            insert = (
                f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) "  # noqa: S608 -- names of ours
                f"VALUES ({', '.join('?' * len(columns))})"
            )
            for row in _rows(old, table, columns):
                if model is None or _readable(row, *model):
                    with contextlib.suppress(sqlite3.IntegrityError):
                        carried[table] += into.execute(insert, row).rowcount
        _carry_meta(meta, into)
    return carried


def _carry_meta(meta: dict[str, str], into: sqlite3.Connection) -> None:
    (last,) = into.execute("SELECT coalesce(max(sequence), 0) FROM outbox").fetchone()
    told = meta.get("sequence", "0")
    sequence = max(int(last), int(told) if told.isdecimal() else 0)
    # All of it: whether the node is cordoned, and its labels, are there too.
    rows = {**meta, "sequence": str(sequence)}
    into.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", list(rows.items()))


def _columns(connection: sqlite3.Connection, table: str) -> tuple[str, ...]:
    try:
        return tuple(row[1] for row in connection.execute(f"PRAGMA table_info({table})"))
    except sqlite3.Error:
        return ()


def _rows(
    connection: sqlite3.Connection, table: str, columns: tuple[str, ...]
) -> Iterator[tuple[object, ...]]:
    """All rows that can be read: from the front up to the damage, and from the back down to it."""
    for order in ("ASC", "DESC"):
        query = f"SELECT {', '.join(columns)} FROM {table} ORDER BY rowid {order}"  # noqa: S608 -- as above
        found: Callable[[], tuple[object, ...] | None]
        try:
            found = connection.execute(query).fetchone
            while (row := found()) is not None:
                yield row
            return
        except (sqlite3.Error, UnicodeDecodeError) as exc:
            log.warning("Table %s of the damaged database cannot be read to its end: %s", table, exc)


def _readable(row: tuple[object, ...], column: int, model: type[BaseModel]) -> bool:
    try:
        model.model_validate_json(row[column])  # type: ignore[arg-type]
    except (ValidationError, IndexError, TypeError):
        return False
    return True
