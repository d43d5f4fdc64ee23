"""The fleet as its buckets show it: nodes by their leases, pods by their last status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from vcnode.aio import Tasks
from vcnode.client.bucket import Begin, BucketWatch, Change, Gone, Put, Ready
from vcnode.errors import UnavailableError
from vcnode.models.node import NodeLease
from vcnode.models.pod import PodStatus
from vcnode.models.subjects import Subjects

if TYPE_CHECKING:
    from vcnode.client.requests import Requester

log = logging.getLogger(__name__)

MAX_WAITING_CHANGES = 100_000
ELECTION_S = 10.0
"""Seconds for which a cluster may take no writes: its servers elect, after one has died, for up to 9."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """What is known of a node."""

    lease: NodeLease
    """Its newest lease."""
    seen_at: float
    """When that came (monotonic), or when the server was heard again after a silence."""
    lost_at: float | None = None
    """When it was found not renewed in time (monotonic); None while the node lives."""

    @property
    def alive(self) -> bool:
        """Whether the lease holds."""
        return self.lost_at is None


@dataclass(frozen=True, slots=True)
class FleetChange:
    """One thing that became different."""

    kind: Literal["node.joined", "node.changed", "node.lost", "node.left", "pod.changed", "pod.gone"]
    """``lost``: the lease was not renewed in time. ``left``: the node gave it back when it stopped."""
    node: str
    """The node, or the node of the pod."""
    pod_id: str | None = None
    """The pod."""
    lease: NodeLease | None = None
    """The node's lease; of a node that is gone, the last one."""
    pod: PodStatus | None = None
    """The pod's status; of a pod that is gone, the last one."""


PodKey = tuple[str, str]


class FleetView:
    """A copy of both buckets that keeps itself up to date; made by `Fleet`.

    Leases are judged by this process's own clock: a node is lost when no newer lease of it has come for as
    long as its last one lasts, whatever the clocks of the hosts say. Time in which this process itself
    hears nothing does not count: a node is lost when the server is heard *after* the lease should have been
    renewed, and once the server is heard again after a silence, every node has the whole time anew. Nor does
    time in which nobody at all could renew anything: the servers of a cluster may be electing.
    """

    def __init__(
        self, requester: Requester, subjects: Subjects, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._requester = requester
        self._subjects = subjects
        self._nodes: dict[str, NodeView] = {}
        self._pods: dict[PodKey, PodStatus] = {}
        self._unseen: set[PodKey] = set()
        self._left_at: dict[str, float] = {}
        self._complete_at: float | None = None
        self._heard_at = 0.0
        self._renewed_at = 0.0
        """When somebody last renewed a lease."""
        self._in_snapshot = True
        self._next_end = 0.0
        """No lease runs out before."""
        self._tasks = Tasks()
        self._nodes_ready = asyncio.Event()
        self._pods_ready = asyncio.Event()
        self._listeners: set[Callable[[FleetChange], None]] = set()

    @property
    def nodes(self) -> Mapping[str, NodeView]:
        """All nodes of which a lease is known, the lost ones included, by name."""
        return self._nodes

    @property
    def pods(self) -> Mapping[PodKey, PodStatus]:
        """The last status of every pod, by node and pod id; those of lost nodes included."""
        return self._pods

    def gone_for_s(self, node: str) -> float | None:
        """Seconds for which a node has certainly not held a lease that this view would know of.

        Counted from when the lease ran out or was given back. A node that was never seen may have been there
        until just before this view began: counted from when it was complete. Time in which nothing was heard
        of the bucket does not count. None while the lease holds.
        """
        known = self._nodes.get(node)
        if known is not None and known.alive:
            return None
        since = known.lost_at if known is not None else self._left_at.get(node, self._complete_at)
        return 0.0 if since is None else max(0.0, self._heard_at - since)

    def start(self) -> None:
        """Begin to watch; `ready` tells when the view is complete."""
        self._tasks.spawn(self._watch(self._subjects.node_bucket, self._on_node), name="watch-nodes")
        self._tasks.spawn(self._watch(self._subjects.pod_bucket, self._on_pod), name="watch-pods")

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        await self._tasks.close()

    async def ready(self, *, timeout_s: float = 10.0) -> None:
        """Wait until both buckets have been read.

        Raises:
            UnavailableError: They cannot be read within *timeout_s* seconds (no node was ever there?).
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._nodes_ready.wait()
                await self._pods_ready.wait()
        except TimeoutError as exc:
            raise UnavailableError(
                "The buckets of nodes and pods cannot be read; the first node that connects makes them."
            ) from exc

    async def changes(self) -> AsyncIterator[FleetChange]:
        """What is known now, as if it had just come, then every change; no gap in between.

        Raises:
            UnavailableError: The reader is so slow that changes pile up without end.
        """
        queue: asyncio.Queue[FleetChange] = asyncio.Queue(MAX_WAITING_CHANGES)
        overrun = False

        def listen(change: FleetChange) -> None:
            nonlocal overrun
            if queue.full():
                overrun = True
            else:
                queue.put_nowait(change)

        for name, node in self._nodes.items():
            if node.alive:
                listen(FleetChange("node.joined", name, lease=node.lease))
        for (name, pod_id), status in self._pods.items():
            listen(FleetChange("pod.changed", name, pod_id, pod=status))
        with self.listening(listen):
            while True:
                if overrun and queue.empty():
                    raise UnavailableError("Changes of the fleet come faster than they are read; watch anew.")
                yield await queue.get()

    @contextlib.contextmanager
    def listening(self, listener: Callable[[FleetChange], None]) -> Iterator[None]:
        """Call *listener* with each change, for as long as the block runs."""
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)

    def _tell(self, change: FleetChange) -> None:
        for listener in tuple(self._listeners):
            listener(change)

    async def _watch(self, bucket: str, take: Callable[[Change], None]) -> None:
        async for change in BucketWatch(self._requester, bucket).changes():
            take(change)

    # ---- nodes ---------------------------------------------------------------------------------------

    def _on_node(self, change: Change) -> None:
        if isinstance(change, Begin):
            self._in_snapshot = True
        elif isinstance(change, Ready):
            self._complete()
        elif isinstance(change, Put):
            self._put_node(change)
        elif isinstance(change, Gone):
            known = self._nodes.pop(change.key, None)
            if known is not None:
                self._left_at[change.key] = self._clock()
                self._tell(FleetChange("node.left", change.key, lease=known.lease))
        if not self._in_snapshot:
            self._heard()

    def _put_node(self, change: Put) -> None:
        try:
            lease = NodeLease.model_validate_json(change.value)
        except ValidationError:
            log.warning("Something that is no lease is in the bucket of nodes, under %s", change.key)
            return
        self._renew(lease)

    def _renew(self, lease: NodeLease) -> None:
        known = self._nodes.get(lease.node)
        if known is not None and known.lease.renewed_at == lease.renewed_at:
            return  # a snapshot that was taken anew brings no news
        self._left_at.pop(lease.node, None)
        now = self._clock()
        if not self._in_snapshot and now - self._renewed_at > lease.lease_s * 2 / 3:
            self._forgive(now)  # two whole intervals in which nobody renewed anything
        self._renewed_at = now
        self._nodes[lease.node] = NodeView(lease, now)
        self._next_end = min(self._next_end, now + lease.lease_s)
        if known is None or not known.alive or known.lease.epoch != lease.epoch:
            self._tell(FleetChange("node.joined", lease.node, lease=lease))
        else:
            self._tell(FleetChange("node.changed", lease.node, lease=lease))

    def _heard(self) -> None:
        """All that the bucket had to say up to now has come: find leases that were not renewed."""
        now = self._heard_at = self._clock()
        if now < self._next_end:
            return
        for name, node in list(self._nodes.items()):
            end = node.seen_at + node.lease.lease_s
            if node.alive and end <= now and (end <= self._renewed_at or end + ELECTION_S <= now):
                self._nodes[name] = replace(node, lost_at=now)
                self._tell(FleetChange("node.lost", name, lease=node.lease))
        ends = (node.seen_at + node.lease.lease_s for node in self._nodes.values() if node.alive)
        self._next_end = min(ends, default=now)

    def _complete(self) -> None:
        """A snapshot has come: what was missed meanwhile is nobody's fault."""
        now = self._heard_at = self._clock()
        self._in_snapshot = False
        self._renewed_at = now
        self._forgive(now)
        if self._complete_at is None:
            self._complete_at = now
        self._nodes_ready.set()

    def _forgive(self, now: float) -> None:
        """Give every node its whole time anew."""
        for name, node in self._nodes.items():
            if node.alive:
                self._nodes[name] = replace(node, seen_at=now)

    # ---- pods ----------------------------------------------------------------------------------------

    def _on_pod(self, change: Change) -> None:
        if isinstance(change, Begin):
            self._unseen = set(self._pods)
        elif isinstance(change, Put):
            self._put_pod(change)
        elif isinstance(change, Gone):
            self._forget_pod(_pod_key(change.key))
        elif isinstance(change, Ready):
            for key in self._unseen:
                self._forget_pod(key)
            self._unseen = set()
            self._pods_ready.set()

    def _put_pod(self, change: Put) -> None:
        key = _pod_key(change.key)
        try:
            status = PodStatus.model_validate_json(change.value)
        except ValidationError:
            log.warning("Something that is no status is in the bucket of pods, under %s", change.key)
            return
        self._unseen.discard(key)
        if self._pods.get(key) != status:
            self._pods[key] = status
            self._tell(FleetChange("pod.changed", *key, pod=status))

    def _forget_pod(self, key: PodKey) -> None:
        known = self._pods.pop(key, None)
        if known is not None:
            self._tell(FleetChange("pod.gone", *key, pod=known))


def _pod_key(key: str) -> PodKey:
    node, _, pod_id = key.partition(".")
    return node, pod_id
