"""What the node tells schedulers of itself: labels, and whether it takes new pods. Survives restarts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from vcnode.errors import ResourceExhaustedError, UnavailableError
from vcnode.models.base import JsonObject
from vcnode.models.events import EventKind
from vcnode.models.fleet import NodeStanding
from vcnode.pods.store import Store, Tx

_KEY = "standing"
MAX_LABELS = 64
"""Labels of a node: each lease carries them all, and a message that is too large ends the connection."""


@dataclass(frozen=True, slots=True)
class _Changes:
    """What differs from the settings."""

    labels: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    cordoned: bool = False
    reason: str = ""

    def encoded(self) -> str:
        return json.dumps(
            {
                "labels": dict(self.labels),
                "removed": sorted(self.removed),
                "cordoned": self.cordoned,
                "reason": self.reason,
            }
        )

    @classmethod
    def decoded(cls, text: str) -> _Changes:
        content = json.loads(text)
        return cls(content["labels"], frozenset(content["removed"]), content["cordoned"], content["reason"])


class Standing:
    """The node's labels and whether it is cordoned; made by `open`.

    Args:
        store: Keeps what was changed.
        labels: Those of the settings.
        taints: Those of the settings.
        mock: Whether the node only pretends to run VMs.
    """

    def __init__(
        self, store: Store, *, labels: Mapping[str, str], taints: tuple[str, ...], mock: bool
    ) -> None:
        self._store = store
        self._given = labels
        self._taints = taints
        self._mock = mock
        self._changes = _Changes()
        self._lock = asyncio.Lock()
        self._draining = False
        self._listeners: list[Callable[[], None]] = []

    @classmethod
    async def open(
        cls, store: Store, *, labels: Mapping[str, str], taints: tuple[str, ...], mock: bool
    ) -> Standing:
        """Read what was changed since the settings were written. Raises StorageError as `Store.read`."""
        standing = cls(store, labels=labels, taints=taints, mock=mock)

        def read(connection: sqlite3.Connection) -> str | None:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (_KEY,)).fetchone()
            return None if row is None else str(row[0])

        if (text := await store.read(read)) is not None:
            standing._changes = _Changes.decoded(text)
        return standing

    @property
    def draining(self) -> bool:
        """Whether pods are being stopped, or the process is about to end."""
        return self._draining

    @draining.setter
    def draining(self, draining: bool) -> None:
        self._draining = draining
        self._tell()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have *listener* called whenever `status` may say something else."""
        self._listeners.append(listener)

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def status(self) -> NodeStanding:
        """Labels, taints, and whether new pods may come."""
        return self._status(self._changes)

    def _status(self, changes: _Changes) -> NodeStanding:
        kept = {key: value for key, value in self._given.items() if key not in changes.removed}
        state = "draining" if self.draining else "cordoned" if changes.cordoned else "ready"
        return NodeStanding(
            node=self._store.node_name,
            state=state,
            reason=changes.reason or None if changes.cordoned else None,
            labels=kept | dict(changes.labels),
            taints=self._taints,
        )

    def check_takes_pods(self) -> None:
        """See that new pods may come.

        Raises:
            UnavailableError: The node is cordoned or draining.
        """
        now = self.status()
        if now.state != "ready":
            why = f" ({now.reason})" if now.reason else ""
            raise UnavailableError(
                f"Node {now.node} is {now.state}{why} and takes no new pods; choose another, or send "
                "node.uncordon.",
                state=now.state,
            )

    async def label(self, labels: Mapping[str, str], remove: tuple[str, ...]) -> NodeStanding:
        """Set and remove labels.

        Raises:
            ResourceExhaustedError: The node would have more than `MAX_LABELS`; or the disk is full.
            StorageError: It cannot be kept.
        """

        def change(now: _Changes) -> _Changes:
            after = replace(
                now,
                labels={k: v for k, v in now.labels.items() if k not in remove} | dict(labels),
                removed=(now.removed | (self._given.keys() & set(remove))) - labels.keys(),
            )
            if len(found := self._status(after).labels) > MAX_LABELS and labels:
                raise ResourceExhaustedError(
                    f"The node would have {len(found)} labels; at most {MAX_LABELS} are kept. Remove some.",
                    limit=MAX_LABELS,
                )
            return after

        return await self._change(change, EventKind.NODE_LABELLED)

    async def cordon(self, reason: str) -> NodeStanding:
        """Take no new pods. Idempotent. Raises as `label`."""
        return await self._change(
            lambda now: replace(now, cordoned=True, reason=reason), EventKind.NODE_CORDONED
        )

    async def uncordon(self) -> NodeStanding:
        """Take new pods again. Idempotent. Raises as `label`."""
        return await self._change(
            lambda now: replace(now, cordoned=False, reason=""), EventKind.NODE_UNCORDONED
        )

    async def keep(self) -> None:
        """Write down again what was changed, in a database that may have lost it. Raises as `label`."""
        async with self._lock:
            kept = self._changes.encoded()
            await self._store.write(
                lambda tx: (
                    tx.execute(
                        "INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (_KEY, kept)
                    ).rowcount
                )
            )

    async def announce(self, kind: EventKind, data: JsonObject) -> None:
        """Emit an event about the node. Raises as `label`."""
        await self._store.write(lambda tx: self._emit(tx, kind, data))

    async def _change(self, change: Callable[[_Changes], _Changes], kind: EventKind) -> NodeStanding:
        async with self._lock:  # two changes at once: each is made to what the other has left
            after = change(self._changes)
            status = self._status(after)

            def save(tx: Tx) -> None:
                tx.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (_KEY, after.encoded()))
                self._emit(tx, kind, status.model_dump(mode="json"))

            if after != self._changes:
                await self._store.write(save)
                self._changes = after
                self._tell()
            return status

    def _emit(self, tx: Tx, kind: EventKind, data: JsonObject) -> None:
        tx.emit(kind, self._store.node_name, data, time=self._store.clock(), mock=self._mock)
