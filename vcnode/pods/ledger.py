"""The truth about pods, and the one place where it changes.

A change saves the record, counts its revision up, and puts its events into the outbox, in one transaction;
then it is logged. Reads come from memory.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from vcnode.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from vcnode.models.base import JsonObject
from vcnode.models.call import Call
from vcnode.models.events import EventKind
from vcnode.models.pod import ContainerStatus, PodStatus
from vcnode.models.records import PodRecord
from vcnode.models.vm import NetworkAttachment, VmRecord
from vcnode.pods import edits
from vcnode.pods.capacity import Capacity
from vcnode.pods.edits import Edit, News, find_container
from vcnode.pods.statuses import container_id, container_status, pod_status
from vcnode.pods.store import Store, Tx

log = logging.getLogger(__name__)


class Ledger:
    """Records of pods.

    Args:
        store: The database.
        clock: Gives the current time, with its zone.
        is_mock: Whether the hypervisor of a record only pretends.
        capacity: Admits pods, and disks of containers.
    """

    def __init__(
        self,
        store: Store,
        *,
        clock: Callable[[], datetime],
        is_mock: Callable[[PodRecord], bool],
        capacity: Capacity,
    ) -> None:
        self._capacity = capacity
        self._store = store
        self._clock = clock
        self._is_mock = is_mock
        self.on_change: list[Callable[[str], None]] = []
        """Each is called with the id of each pod whose record has changed or gone, once that is committed."""
        self._listeners: dict[str, set[Callable[[], None]]] = {}
        self._statuses: dict[str, tuple[PodRecord, PodStatus]] = {}
        self.after_change: Callable[[PodRecord], Awaitable[None]] | None = None
        """Called with each record after its change is committed; must not raise."""

    @property
    def records(self) -> Mapping[str, PodRecord]:
        """All records by pod id, in the order of creation. A snapshot."""
        return self._store.pods

    def find(self, pod_id: str) -> PodRecord | None:
        """The newest record of a pod, if there is one."""
        return self._store.pods.get(pod_id)

    def get(self, pod_id: str, call: Call | None = None) -> PodRecord:
        """The newest record of a pod.

        Raises:
            NotFoundError: There is no such pod.
            FailedPreconditionError: *call* expects another revision.
        """
        record = self.find(pod_id)
        if record is None:
            raise NotFoundError(f"There is no pod {pod_id} on node {self._store.node_name}.", pod_id=pod_id)
        if call is not None:
            check_revision(record, call)
        return record

    def status(self, record: PodRecord) -> PodStatus:
        """The record as callers see it."""
        known = self._statuses.get(record.pod_id)
        if known is not None and known[0] is record:  # a record never changes; another one takes its place
            return known[1]
        status = pod_status(record, node=self._store.node_name, mock=self._is_mock(record))
        if self.find(record.pod_id) is record:
            self._statuses[record.pod_id] = (record, status)
        return status

    def container_status(self, record: PodRecord, wanted: str) -> ContainerStatus:
        """A container of the record as callers see it. Raises NotFoundError when it has none of that id."""
        return container_status(record.pod_id, find_container(record, wanted))

    async def add(self, record: PodRecord, call: Call, *, reservation: str | None = None) -> None:
        """Commit a new pod, with its events.

        Args:
            record: The pod.
            call: The command.
            reservation: Its own, claimed: what it keeps is the pod's.

        Raises:
            AlreadyExistsError: There is a pod of that id.
            ResourceExhaustedError: There is no room for it; says what is short and by how much.
            FailedPreconditionError: An image of it was removed meanwhile.
        """

        def add(tx: Tx) -> None:
            if record.pod_id in tx.pods:
                raise AlreadyExistsError(f"Pod {record.pod_id} exists already.", pod_id=record.pod_id)
            self._admit(tx, record, reservation)
            _check_images(tx, record)
            tx.save_pod(record)
            self._emit(tx, record, News(EventKind.POD_CREATED), call)
            for container in record.containers:
                self._emit(tx, record, News(EventKind.CONTAINER_CREATED, container_id(container)), call)

        await self._store.write(add)
        log.info("Pod %s: created", record.pod_id)

    async def change(self, pod_id: str, edit: Edit, call: Call | None = None) -> PodRecord:
        """Commit what *edit* makes of the newest record, with its events.

        A cancellation is held back until the outcome is certain; the change may then have been committed.

        Returns:
            The record afterwards; the same object as before if nothing changed.

        Raises:
            NotFoundError: There is no such pod (any more).
            VcnodeError: What *edit* raised; nothing is changed.
            StorageError, ResourceExhaustedError: The database cannot be written; nothing is changed.
        """

        def change(tx: Tx) -> PodRecord:
            return self._apply(tx, pod_id, edit, call)

        return await self._write(pod_id, change)

    async def begin_start(
        self,
        pod_id: str,
        vm: VmRecord,
        plan: Callable[[Sequence[NetworkAttachment]], NetworkAttachment],
        call: Call,
    ) -> PodRecord:
        """Commit that a start begins, and with it the addresses and ports that the pod gets.

        Args:
            pod_id: The pod.
            vm: What the start is going to make.
            plan: Plans its network, given those of all other pods; see `vcnode.drivers.base.Network.plan`.
            call: The command.

        Raises:
            VcnodeError: As `change`, and what *plan* raised; nothing is changed.
        """

        def begin(tx: Tx) -> PodRecord:
            others = [r.network for r in tx.pods.values() if r.pod_id != pod_id and r.network is not None]
            return self._apply(tx, pod_id, edits.starting(vm, plan(others), call.verb), call)

        return await self._write(pod_id, begin)

    def _apply(self, tx: Tx, pod_id: str, edit: Edit, call: Call | None) -> PodRecord:
        before = tx.pods.get(pod_id)
        if before is None:
            raise NotFoundError(f"There is no pod {pod_id} any more.", pod_id=pod_id)
        after, news = edit(before)
        if after is not before:
            if len(after.containers) > len(before.containers):
                _check_images(tx, after)
                self._admit(tx, after)
            elif after.mem_size_mib > before.mem_size_mib:
                self._admit(tx, after)
            after = after.model_copy(update={"revision": before.revision + 1})
            tx.save_pod(after)
        for item in news:
            self._emit(tx, after, item, call)
        return after

    async def _write(self, pod_id: str, work: Callable[[Tx], PodRecord]) -> PodRecord:
        before = self.find(pod_id)
        try:
            after = await self._store.write(work)
        finally:  # also when the caller goes away: it may have been committed
            self._tell(pod_id)
        if before is not None and after.state is not before.state:
            log.info("Pod %s: %s -> %s (%s)", pod_id, before.state, after.state, after.reason or "")
        if after is not before and self.after_change is not None:
            await self.after_change(after)
        return after

    async def restore(self, records: Iterable[PodRecord]) -> None:
        """Put back records that the database has lost, each as a change of its own; no event tells of it."""

        def restore(tx: Tx) -> None:
            for record in records:
                tx.save_pod(record.model_copy(update={"revision": record.revision + 1}))

        await self._store.write(restore)

    async def remove(self, pod_id: str, call: Call | None = None) -> None:
        """Forget a pod, with its event. Nothing happens if there is no such pod."""

        def remove(tx: Tx) -> None:
            record = tx.pods.get(pod_id)
            if record is not None:
                tx.forget_pod(pod_id)
                self._emit(tx, record, News(EventKind.POD_DELETED), call)

        try:
            await self._store.write(remove)
        finally:
            self._tell(pod_id)
        self._statuses.pop(pod_id, None)
        log.info("Pod %s: deleted", pod_id)

    @contextlib.contextmanager
    def listening(self, pod_id: str, listener: Callable[[], None]) -> Iterator[None]:
        """Call *listener*, within a block, after each change of a pod's record, its removal included."""
        self._listeners.setdefault(pod_id, set()).add(listener)
        try:
            yield
        finally:
            listeners = self._listeners[pod_id]
            listeners.discard(listener)
            if not listeners:
                del self._listeners[pod_id]

    def _tell(self, pod_id: str) -> None:
        for listener in tuple(self._listeners.get(pod_id, ())):
            listener()
        for told in self.on_change:
            told(pod_id)

    async def announce(self, kind: EventKind, data: JsonObject, *, mock: bool) -> None:
        """Commit an event of the node itself."""

        def announce(tx: Tx) -> None:
            tx.emit(kind, self._store.node_name, data, time=self._clock(), mock=mock)

        await self._store.write(announce)

    def _admit(self, tx: Tx, record: PodRecord, reservation: str | None = None) -> None:
        """See that there is room for *record*, in its new form, beside all other pods."""
        others = [pod for pod in tx.pods.values() if pod.pod_id != record.pod_id]
        self._capacity.admit(others, record, reservation=reservation)

    def _emit(self, tx: Tx, record: PodRecord, news: News, call: Call | None) -> None:
        subject = record.pod_id if news.container_id is None else f"{record.pod_id}/{news.container_id}"
        data = news.facts
        if data is None:
            status = (
                self.status(record)
                if news.container_id is None
                else self.container_status(record, news.container_id)
            )
            data = status.model_dump(mode="json")
        tx.emit(
            news.kind,
            subject,
            data,
            time=self._clock(),
            mock=self._is_mock(record),
            command_id=None if call is None else call.command_id or None,
            traceparent=None if call is None else call.traceparent,
        )


def check_revision(record: PodRecord, call: Call) -> None:
    """See that the record has the revision that *call* expects, if it expects one.

    Raises:
        FailedPreconditionError: It has another; ``details`` has both.
    """
    if call.expected_revision is not None and call.expected_revision != record.revision:
        raise FailedPreconditionError(
            f"Pod {record.pod_id} has revision {record.revision}, not {call.expected_revision}.",
            revision=record.revision,
            expected=call.expected_revision,
        )


def _check_images(tx: Tx, record: PodRecord) -> None:
    """See that no image of a container was removed between its look-up and now."""
    known = {image.digest for image in tx.images.values()}
    known.update(c.image_digest for pod in tx.pods.values() for c in pod.containers if c.image_digest)
    for container in record.containers:
        if container.image_digest is not None and container.image_digest not in known:
            raise FailedPreconditionError(f"Image {container.spec.image} was removed meanwhile.")
