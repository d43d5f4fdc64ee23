"""Freeing what a pod holds on the host: its VM, its network, its directory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from pathlib import Path

from vcnode.errors import CleanupError, VcnodeError
from vcnode.models.pod import StopOutcome
from vcnode.models.records import ContainerRecord, PodRecord
from vcnode.models.vm import NetworkAttachment, NetworkRequest, VmRecord
from vcnode.pods.hooks import run_all_softly, state_of
from vcnode.pods.live import LivePod
from vcnode.pods.parts import KILL_LIMIT_S, REQUEST_LIMIT_S, Parts
from vcnode.pods.undo import UndoStack

log = logging.getLogger(__name__)


class Holdings:
    """What one pod holds on the host. Each ``free_`` method succeeds when there is nothing (any more)."""

    def __init__(self, parts: Parts, record: PodRecord, vm: VmRecord) -> None:
        self._parts = parts
        self._record = record
        self.vm = vm
        """The VM as far as it is known: without a pid before its launch."""
        self.network = record.network or NetworkAttachment(model=record.network_model, vm_id=vm.vm_id)
        """Its network, as planned or as made."""
        self.live = parts.live.get(record.pod_id)
        """Set once the VM is launched, if this process has its handle."""
        self.outcome: StopOutcome = "absent"
        """How the VM ended, once `free_vm` was called."""

    @property
    def directory(self) -> Path:
        """The VM's directory."""
        return Path(self.vm.directory)

    def undo_all(self) -> UndoStack:
        """Undos for everything that the pod may hold, in the order in which a start makes it."""
        undo = UndoStack()
        self.undo_hooks(undo)
        self.undo_network(undo)
        self.undo_directory(undo)
        self.undo_vm(undo)
        return undo

    def undo_hooks(self, undo: UndoStack) -> None:
        """Register the hooks after the stop. Pushed first, for they run when all else is gone."""
        if self._record.spec.hooks.post_stop:
            undo.push("hooks", self._run_hooks)

    def undo_network(self, undo: UndoStack) -> None:
        """Register the undo of the network."""
        undo.push(f"network of VM {self.vm.vm_id}", self._free_network)

    def undo_directory(self, undo: UndoStack) -> None:
        """Register the undo of the directory and all that is shared in it."""
        undo.push(f"directory {self.vm.directory}", self._free_directory)

    def undo_vm(self, undo: UndoStack) -> None:
        """Register the undo of the VM."""
        undo.push(f"VM {self.vm.vm_id}", self._free_vm)

    async def _run_hooks(self) -> None:
        hooks = self._record.spec.hooks.post_stop
        await run_all_softly(self._parts.storage, hooks, state_of(self._record, "stopped"))

    async def _free_network(self) -> None:
        network = self._parts.network(self._record)
        await network.detach(self.network, timeout_s=REQUEST_LIMIT_S)

    async def _free_directory(self) -> None:
        await self._parts.storage.remove_vm_dir(self.vm.vm_id)

    async def _free_vm(self) -> None:
        live = self.live
        if live is None:
            killed = await self._parts.hypervisor(self._record).kill(self.vm, timeout_s=KILL_LIMIT_S)
            self.outcome = "forced" if killed else "absent"
            return
        live.ending = True
        async with asyncio.timeout(KILL_LIMIT_S):
            await live.close_session()
            self.outcome = await live.vm.stop(grace_s=0)
        await self._let_go(live)

    async def _let_go(self, live: LivePod) -> None:
        await live.stop_watching()
        await live.vm.close()
        live.gone.set()
        if self._parts.live.get(live.pod_id) is live:
            del self._parts.live[live.pod_id]
        self.live = None


def request_of(record: PodRecord, vm_id: str) -> NetworkRequest:
    """What a network driver is asked for."""
    return NetworkRequest(pod_id=record.pod_id, vm_id=vm_id, config=record.spec.network)


async def remove_pod_disks(parts: Parts, record: PodRecord) -> None:
    """Delete all writable disks of a pod: those of its containers, and the overlay over its disk image.

    Raises:
        CleanupError: Some stay; can be repeated.
    """
    await _remove_disks(parts, (record.disk_id, *(c.layer_id for c in record.containers)))


async def remove_layers(parts: Parts, containers: Iterable[ContainerRecord]) -> None:
    """Delete the writable disks of containers, which no VM has any more.

    A disk outlives its VM, as the container does; so this is for the end of the container or its pod.

    Raises:
        CleanupError: Some stay; can be repeated.
    """
    await _remove_disks(parts, (container.layer_id for container in containers))


async def _remove_disks(parts: Parts, disk_ids: Iterable[str | None]) -> None:
    left = []
    for disk_id in disk_ids:
        if disk_id is not None:
            try:
                await parts.storage.remove_layer(disk_id)
            except VcnodeError as exc:
                log.warning("Disk %s stays", disk_id, exc_info=exc)
                left.append(f"disk {disk_id}")
    if left:
        raise CleanupError("A writable disk could not be deleted; delete again to retry.", tuple(left))


async def release(parts: Parts, record: PodRecord) -> tuple[str, ...]:
    """Free everything that a pod holds on the host, killing its VM if it lives.

    A cancellation is held back until all was tried.

    Returns:
        What is left, as one phrase each.
    """
    if record.vm is None:
        return ()
    return await Holdings(parts, record, record.vm).undo_all().unwind()
