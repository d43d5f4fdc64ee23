"""Stopping a pod, gently as long as there is time for it, and freeing what it held."""

from __future__ import annotations

import asyncio
import logging

from vcnode import aio
from vcnode.errors import CleanupError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.pod import AgentType, PodState, StopOutcome
from vcnode.models.records import PodRecord
from vcnode.pods import edits
from vcnode.pods.containers import Containers
from vcnode.pods.lifecycle import CONTAINER_ALIVE
from vcnode.pods.live import LivePod
from vcnode.pods.parts import KILL_LIMIT_S, Parts
from vcnode.pods.release import Holdings
from vcnode.pods.statuses import container_id

log = logging.getLogger(__name__)

SHUTDOWN_LIMIT_S = 5.0
"""Seconds for an orderly power-off of the guest, besides the grace that its containers may use up."""
FREE_LIMIT_S = 180.0
"""Seconds for killing the VM, freeing everything and recording it, all steps together."""


class Stopper:
    """Stops pods; the caller holds the pod's lock."""

    def __init__(self, parts: Parts, containers: Containers) -> None:
        self._parts = parts
        self._containers = containers

    async def stop(
        self, pod_id: str, call: Call, *, grace_s: float, reason: str | None = None
    ) -> StopOutcome:
        """End a pod's containers and VM and free what it held on the host.

        Idempotent: a pod that does not run stays what it is (``ready``, ``stopped``, ``failed``), and what
        an earlier attempt has left over is freed. Cancellation kills the VM at once, finishes, then
        propagates.

        Args:
            pod_id: The pod.
            call: The command.
            grace_s: Seconds that containers may take to end by themselves, after which they are killed and
                the guest powers off; 0 kills the VM at once.
            reason: Why, unless the command is reason enough.

        Returns:
            ``graceful``; ``forced`` when QEMU had to be killed; ``absent`` when nothing ran.

        Raises:
            NotFoundError: There is no such pod.
            CleanupError: Something could not be freed: the pod is ``failed`` with ``leftovers``.
        """
        parts = self._parts
        record = parts.ledger.get(pod_id, call)
        if record.state in (PodState.READY, PodState.STOPPED, PodState.FAILED):
            if record.restarts.at is not None:
                await parts.ledger.change(pod_id, edits.pod_restart_cancelled(), call)
            await self.free(record, call)
            return "absent"
        outcome: StopOutcome = "absent"
        paused = record.state is PodState.PAUSED
        try:
            record = await parts.ledger.change(pod_id, edits.stopping(call.verb, reason), call)
            if (live := parts.live.get(pod_id)) is not None:
                live.ending = True
                # A paused guest hears nothing; asking it would only use up the grace.
                if grace_s > 0 and not paused:
                    outcome = await self._ask_to_end(live, record, grace_s=grace_s)
        finally:
            # Unless the beginning could not be saved: then nothing was done, and the pod goes on.
            if parts.ledger.get(pod_id).state is PodState.STOPPING:
                outcome = await aio.finish(self._end(pod_id, outcome, call, reason), timeout_s=FREE_LIMIT_S)
        return outcome

    async def free(self, record: PodRecord, call: Call) -> None:
        """Free what a pod that does not run may still hold on the host.

        Raises:
            CleanupError: Something is left; the pod is ``failed`` with ``leftovers``.
        """
        if record.vm is None:
            return
        held = Holdings(self._parts, record, record.vm)
        leftovers = await held.undo_all().unwind()
        if record.state is PodState.FAILED:
            await self._parts.ledger.change(record.pod_id, edits.freed(leftovers), call)
        _raise_for(record, leftovers)

    async def _ask_to_end(self, live: LivePod, record: PodRecord, *, grace_s: float) -> StopOutcome:
        """The gentle part: containers, then the guest, then the VM; returns how far it got."""
        try:
            await self._containers.halt_all(live, record, grace_s=grace_s)
            ended = [container_id(c) for c in record.containers if c.state in CONTAINER_ALIVE]
            await self._parts.logs.drained(live.pod_id, ended)
            await live.require_session().shutdown(timeout_s=SHUTDOWN_LIMIT_S)
            if record.agent_type is AgentType.NOOP:
                return "absent"  # nobody in the guest has heard the request: do not wait for its effect
            async with asyncio.timeout(SHUTDOWN_LIMIT_S + KILL_LIMIT_S):
                return await live.vm.stop(grace_s=SHUTDOWN_LIMIT_S)
        except (VcnodeError, TimeoutError) as exc:
            log.info("Pod %s does not end by itself", live.pod_id, exc_info=exc)
            return "absent"

    async def _end(self, pod_id: str, outcome: StopOutcome, call: Call, why: str | None) -> StopOutcome:
        """The certain part: kill what lives, free everything, record it."""
        parts = self._parts
        record = parts.ledger.get(pod_id)
        leftovers: tuple[str, ...] = ()
        if record.vm is not None:
            held = Holdings(parts, record, record.vm)
            leftovers = await held.undo_all().unwind()
            if outcome == "absent":
                outcome = held.outcome
        now = parts.clock()
        if leftovers:
            reason = "The pod was stopped, but not everything could be freed."
            await parts.ledger.change(pod_id, edits.failed_and_freed(reason, leftovers, now), call)
            _raise_for(record, leftovers)
        await parts.ledger.change(pod_id, edits.stopped(why, now, call.verb), call)
        return outcome


def _raise_for(record: PodRecord, leftovers: tuple[str, ...]) -> None:
    if leftovers:
        raise CleanupError(
            f"Pod {record.pod_id} has left something on the host; delete it again to retry.",
            leftovers,
            pod_id=record.pod_id,
        )
