"""After a restart of the node agent: records against what lives.

Runs before any command is taken. A pod that ran is adopted if its VM still lives and answers; whatever was
half done is undone or finished; a pod whose VM ended meanwhile has failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from vcnode import logs
from vcnode.errors import VcnodeError
from vcnode.models.pod import PodState
from vcnode.models.records import PodRecord
from vcnode.pods import edits, resizing
from vcnode.pods.lifecycle import POD_HAS_VM
from vcnode.pods.live import LivePod
from vcnode.pods.notes import Notes
from vcnode.pods.parts import REQUEST_LIMIT_S, Parts
from vcnode.pods.release import release
from vcnode.pods.watch import Watcher

log = logging.getLogger(__name__)

CONCURRENT = 8
"""Pods recovered at once."""
AGENT_LIMIT_S = 15.0
"""Seconds for the agent of a VM that was found again to answer."""
VM_ENDED = "The VM ended while the node agent was away."
NOT_TAKEN_OVER = "The VM could not be taken over after a restart of the node agent"
HALF_STARTED = "The node agent ended during the start; everything was undone."


@dataclass(slots=True)
class Recovered:
    """What a recovery found, by pod id."""

    adopted: list[str] = field(default_factory=list)
    """They run on."""
    failed: list[str] = field(default_factory=list)
    """Their VM was gone, or could not be reached and was killed."""
    restored: tuple[str, ...] = ()
    """The database lacked them, or their last changes; they were found by the notes of their VMs."""
    undone: list[str] = field(default_factory=list)
    """Half-done starts and stops that were taken back or finished; and leftovers that could be freed."""


class Recovery:
    """Adopts what lives, mends what was half done."""

    def __init__(self, parts: Parts, watcher: Watcher, notes: Notes) -> None:
        self._parts = parts
        self._watcher = watcher
        self._notes = notes

    async def run(self) -> Recovered:
        """Recover every pod; one that cannot be recovered is ``failed`` and keeps none of the others up."""
        found = Recovered(restored=await self._notes.restore())
        slots = asyncio.Semaphore(CONCURRENT)
        tasks = []
        for record in self._parts.ledger.records.values():
            if record.vm is not None or record.state in (PodState.STARTING, PodState.STOPPING):
                work = self._recover(record, found, slots)
                with logs.own_work(pod_id=record.pod_id):
                    tasks.append(self._parts.tasks.spawn(work, name=f"recover {record.pod_id}"))
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()
        return found

    async def _recover(self, record: PodRecord, found: Recovered, slots: asyncio.Semaphore) -> None:
        async with slots:
            act: Callable[[PodRecord, Recovered], Awaitable[None]]
            if record.state in POD_HAS_VM:
                act = self._adopt
            elif record.state is PodState.FAILED:
                act = self._free
            else:
                act = self._undo
            await act(record, found)

    async def _adopt(self, record: PodRecord, found: Recovered) -> None:
        """Take a running VM over, or record that it is gone."""
        try:
            reason = await self._take_over(record)
        except VcnodeError as exc:
            log.warning("Pod %s: its VM cannot be taken over", record.pod_id, exc_info=exc)
            reason = f"{NOT_TAKEN_OVER}: {exc.message}"
        except Exception as exc:  # whatever it is: a pod that nobody watches must not be called running
            log.exception("Pod %s: its VM cannot be taken over", record.pod_id)
            reason = f"{NOT_TAKEN_OVER}: {type(exc).__name__}"
        if reason is None:
            found.adopted.append(record.pod_id)
            return
        if (live := self._parts.live.get(record.pod_id)) is not None:
            live.ending = True
        await self._watcher.fail(record.pod_id, reason)
        found.failed.append(record.pod_id)

    async def _take_over(self, record: PodRecord) -> str | None:
        """Open the VM and its session again; the reason why there is nothing to take over, or None."""
        if record.vm is None:
            return VM_ENDED
        parts = self._parts
        vm = await parts.hypervisor(record).recover(record.vm, timeout_s=REQUEST_LIMIT_S)
        if vm is None:
            return VM_ENDED
        live = parts.live[record.pod_id] = LivePod(record.pod_id, vm)
        await self._recover_network(record)
        was_paused = vm.paused
        if record.state is PodState.PAUSED:
            # Its agent cannot answer; the resume opens a session. A half-done resume is taken back.
            live.paused = True
            await vm.pause(timeout_s=REQUEST_LIMIT_S)
        else:
            if was_paused:  # a half-done pause is taken back
                await vm.resume(timeout_s=REQUEST_LIMIT_S)
            await self._watcher.join(live, timeout_s=AGENT_LIMIT_S, set_clock=was_paused)
            self._watcher.follow(live)
            await resizing.put_right(live, record)
        self._watcher.watch_vm(live)
        return None

    async def _recover_network(self, record: PodRecord) -> None:
        """Mend the network of a running pod; the pod goes on even if that cannot be."""
        if record.network is None:
            return
        try:
            await self._parts.network(record).recover(record.network, timeout_s=REQUEST_LIMIT_S)
        except VcnodeError as exc:
            log.error("Pod %s: its network does not stand any more", record.pod_id, exc_info=exc)

    async def _undo(self, record: PodRecord, found: Recovered) -> None:
        """Take back a half-done start, or finish a half-done stop."""
        leftovers = await release(self._parts, record)
        now = self._parts.clock()
        if leftovers or record.state is PodState.STARTING:
            edit = edits.failed_and_freed(HALF_STARTED, leftovers, now)
        else:
            edit = edits.stopped(record.reason, now, "pod.stop")
        await self._watcher.save(record.pod_id, edit)
        found.undone.append(record.pod_id)

    async def _free(self, record: PodRecord, found: Recovered) -> None:
        """Try again to free what a failed pod has left over."""
        leftovers = await release(self._parts, record)
        if leftovers != record.leftovers:
            await self._watcher.save(record.pod_id, edits.freed(leftovers))
        if not leftovers:
            found.undone.append(record.pod_id)
