"""Changing what a pod and its containers may have while they run: ``pod.resize`` and ``container.update``.

Record and VM agree at every time but within a command; after a crash in the middle of one, the next session
and the recovery make the VM what the record says. A pod that grows is admitted before it gets anything; one
that shrinks is only counted as smaller once its guest has given back what it gives.
"""

from __future__ import annotations

import logging

from vcnode import aio
from vcnode.drivers.base import Hypervisor
from vcnode.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnsupportedError,
    VcnodeError,
)
from vcnode.models.call import Call
from vcnode.models.pod import ContainerResources, ContainerStatus, PodState
from vcnode.models.records import PodRecord
from vcnode.pods import edits
from vcnode.pods.edits import find_container
from vcnode.pods.lifecycle import POD_TAKES_CONTAINERS, require
from vcnode.pods.live import LivePod, require_live
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts

log = logging.getLogger(__name__)

SHRINK_LIMIT_S = 20.0
"""Seconds for a guest to give memory back: 1 GiB takes about a second under TCG."""
RESERVE_MIB = 16
"""Memory that has to be left to a guest that shrinks, beside what it uses."""
_RUNNING = frozenset({PodState.RUNNING})


def has_balloon(record: PodRecord, hypervisor: Hypervisor) -> bool:
    """Whether the pod's VM gets a balloon: only if it is certain to have memory of its own."""
    return record.spec.template == "never" and "balloon" in hypervisor.info.capabilities


async def put_right(live: LivePod, record: PodRecord) -> None:
    """Give a VM that was found again the memory that its record says; it goes on if that cannot be."""
    if live.vm.record.balloon:
        try:
            await live.vm.set_memory(record.mem_size_mib, timeout_s=SHRINK_LIMIT_S)
        except VcnodeError as exc:
            log.warning("Pod %s: its memory is not what it should be", record.pod_id, exc_info=exc)


class Resizing:
    """One method per command."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def resize(self, pod_id: str, mem_size_mib: int, call: Call) -> PodRecord:
        """Change the memory of a running pod, within what its VM was started with. Idempotent.

        It keeps that size when it is stopped and started again. The caller holds the pod's lock.

        Raises:
            NotFoundError: There is no such pod.
            FailedPreconditionError: It does not run; its VM shares its memory with a template, or may; or its
                guest uses too much to shrink so far. Nothing changed.
            InvalidArgumentError: More than its VM was started with.
            ResourceExhaustedError: The node has no room for a larger pod.
            HypervisorError, AgentError: QEMU or the guest did not do it; the pod has what it had.
        """
        record = self._parts.ledger.get(pod_id, call)
        require(f"Pod {pod_id}", record.state, _RUNNING, call.verb)
        live = require_live(self._parts.live, pod_id, record.state, call.verb)
        _check_own_memory(record)
        most = record.spec.resources.mem_size_mib
        if mem_size_mib > most:
            raise InvalidArgumentError.field(
                "mem_size_mib", f"can be at most {most}, which is what the pod's VM was started with"
            )
        before = record.mem_size_mib
        if mem_size_mib == before:
            return record
        if mem_size_mib < before:
            await self._check_spare(live, before - mem_size_mib)
        else:
            self._check_host(record, mem_size_mib - before)
        try:
            if mem_size_mib > before:
                await self._parts.ledger.change(pod_id, edits.resized(mem_size_mib, told=False), call)
            await live.vm.set_memory(mem_size_mib, timeout_s=SHRINK_LIMIT_S)
            return await self._parts.ledger.change(pod_id, edits.resized(mem_size_mib), call)
        except BaseException:
            await aio.finish(self._undo(live, before), timeout_s=2 * SHRINK_LIMIT_S)
            raise

    async def update(self, pod_id: str, cid: str, changes: ContainerResources, call: Call) -> ContainerStatus:
        """Change limits of a container, at once if it is in a running guest, else from its next start on.

        They hold until they are changed again, whatever is restarted. Idempotent.

        Args:
            pod_id: The pod.
            cid: The container.
            changes: The fields that are set are changed.
            call: The command.

        Raises:
            NotFoundError: There is no such pod or container.
            FailedPreconditionError: The pod is paused, or starts or stops; or the container uses more than it
                would be allowed. Nothing changed.
            AgentError: The guest did not do it; the limits are what they were.
        """
        ledger = self._parts.ledger
        async with self._parts.locks.hold(pod_id, call.verb):
            record = ledger.get(pod_id, call)
            container = find_container(record, cid)
            require(f"Pod {pod_id}", record.state, POD_TAKES_CONTAINERS, call.verb)
            before = container.limits
            after = before.model_copy(
                update={name: getattr(changes, name) for name in changes.model_fields_set}
            )
            if after == before:
                return ledger.container_status(record, cid)
            live = self._parts.live.get(pod_id)
            try:
                if live is not None and cid in live.provided:
                    session = live.require_session()
                    await session.update_container(cid, after, timeout_s=REQUEST_LIMIT_S)
                record = await ledger.change(pod_id, edits.container_updated(cid, after), call)
            except FailedPreconditionError:
                raise  # the guest has looked first
            except BaseException:
                if live is not None and cid in live.provided:
                    await aio.finish(self._take_back(live, cid, before), timeout_s=2 * REQUEST_LIMIT_S)
                raise
            return ledger.container_status(record, cid)

    async def _check_spare(self, live: LivePod, less_mib: int) -> None:
        """See that the guest has what it is to give back: without it, its containers would be killed."""
        spare_mib = await live.require_session().available_memory(timeout_s=REQUEST_LIMIT_S) >> 20
        if spare_mib - RESERVE_MIB < less_mib:
            raise FailedPreconditionError(
                f"The guest of pod {live.pod_id} can spare {max(0, spare_mib - RESERVE_MIB)} MiB now, not "
                f"{less_mib}; stop what uses its memory, or choose a larger size.",
                spare_mib=max(0, spare_mib - RESERVE_MIB),
                wanted_mib=less_mib,
            )

    def _check_host(self, record: PodRecord, more_mib: int) -> None:
        """See that the host has the memory: what a guest has given back, the host may have used since."""
        if self._parts.hypervisor(record).info.mock:
            return
        if (available := self._parts.memory().available_mib) < more_mib:
            raise ResourceExhaustedError(
                f"Pod {record.pod_id} needs {more_mib} MiB more; the host has {available} MiB left.",
                wanted_mib=more_mib,
                available_mib=available,
            )

    async def _undo(self, live: LivePod, before_mib: int) -> None:
        """Give the guest what it had, unless the change was committed after all; then the record."""
        try:
            record = self._parts.ledger.get(live.pod_id)
            if record.mem_size_mib < before_mib:
                return  # it has shrunk, and that is recorded
            if not live.gone.is_set():
                await live.vm.set_memory(before_mib, timeout_s=SHRINK_LIMIT_S)
            await self._parts.ledger.change(live.pod_id, edits.resized(before_mib, told=False))
        except VcnodeError as exc:
            log.warning("Pod %s: a resize could not be taken back", live.pod_id, exc_info=exc)

    async def _take_back(self, live: LivePod, cid: str, before: ContainerResources) -> None:
        """Make the guest agree with the record again; what cannot be done now, the next session does."""
        try:
            limits = find_container(self._parts.ledger.get(live.pod_id), cid).limits
            if limits == before and not live.gone.is_set():
                await live.require_session().update_container(cid, before, timeout_s=REQUEST_LIMIT_S)
        except VcnodeError as exc:
            log.warning("Container %s/%s: an update was not undone", live.pod_id, cid, exc_info=exc)


def _check_own_memory(record: PodRecord) -> None:
    if record.vm is not None and record.vm.balloon:
        return
    if record.spec.template != "never":
        raise FailedPreconditionError(
            f"Pod {record.pod_id} cannot be resized: its VM shares its memory with a template, which what it "
            "gave back would damage. Create it with template 'never'.",
            template=record.spec.template,
        )
    raise UnsupportedError(f"The VM of pod {record.pod_id} was started without a balloon; start it again.")
