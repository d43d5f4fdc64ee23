"""The node as a member of a fleet: it bids for pods, can be labelled, cordoned and drained."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from datetime import datetime, timedelta

from vcnode import logs
from vcnode.errors import FailedPreconditionError, ResourceExhaustedError, VcnodeError
from vcnode.models.call import Call
from vcnode.models.events import EventKind
from vcnode.models.fleet import Bid, DrainProgress, DrainReport, NodeLabel, NodeStanding, PodBid, PodReleased
from vcnode.models.pod import PodState
from vcnode.models.records import PodRecord
from vcnode.pods import bids
from vcnode.pods.capacity import Capacity, minus, plus, sentence, shortage
from vcnode.pods.service import PodService
from vcnode.pods.standing import Standing

log = logging.getLogger(__name__)

PODS_AT_ONCE = 4
"""Pods of one priority that a drain stops at the same time."""
_NOTHING_RUNS = frozenset({PodState.READY, PodState.STOPPED, PodState.FAILED})


class FleetService:
    """What schedulers ask of the node as a whole.

    Args:
        pods: The node's pods.
        standing: Its labels, and whether it takes pods.
        clock: The current time, with its zone.
    """

    def __init__(self, *, pods: PodService, standing: Standing, clock: Callable[[], datetime]) -> None:
        self._pods = pods
        self._standing = standing
        self._clock = clock
        self._stopping = False

    @property
    def _capacity(self) -> Capacity:
        return self._pods.capacity

    # ---- bids ----------------------------------------------------------------------------------------

    def bid(self, request: PodBid) -> Bid:
        """Say how well a pod would be here, and keep what it needs for ``hold_s`` seconds."""
        capacity = self._capacity
        need, total, records = capacity.need(request.pod), capacity.total, self._pods.snapshot
        taken = capacity.taken_now(records)
        now = bids.Situation(
            standing=self._standing.status(),
            records=records,
            total=total,
            left=minus(total, plus(taken, capacity.reservations.total())),
            images=self._pods.image_names,
            start_ms=self._pods.expected_start_ms(request.pod),
        )
        name, epoch = now.standing.node, self._pods.epoch
        reasons = bids.obstacles(request.pod, request.constraints, now)
        reasons += [f"A secret is sealed for {key}." for key in self._pods.missing_keys(request.pod)]
        reasons += [f"{d.field}: {d.message} (rule {d.rule})." for d in self._pods.denials(request)]
        held_s = None
        if short := shortage(need, now.left):
            reasons.append(sentence("The pod", need, now.left, short))
            if len(reasons) == 1 and not shortage(need, minus(total, taken)):
                held_s = capacity.reservations.longest_s()
        if reasons:
            told = tuple(reasons) if request.explain else ()
            return Bid(node=name, epoch=epoch, able=False, reasons=told, held_s=held_s)
        parts = bids.parts(request.pod, need, request.constraints, now)
        made = Bid(
            node=name,
            epoch=epoch,
            able=True,
            score=round(sum(parts.values()), 4),
            parts=parts,
            predicted_start_ms=round(now.start_ms, 1),
        )
        if not request.hold_s:
            return made
        try:
            reservation = capacity.reservations.hold(need, request.hold_s)
        except ResourceExhaustedError as exc:
            told = (exc.message,) if request.explain else ()
            return Bid(node=name, epoch=epoch, able=False, reasons=told)
        expires_at = self._clock() + timedelta(seconds=request.hold_s)
        return made.model_copy(update={"reservation": reservation.id, "expires_at": expires_at})

    def release(self, reservation_id: str) -> PodReleased:
        """Give a reservation up that is not wanted any more. Idempotent."""
        return PodReleased(existed=self._capacity.reservations.release(reservation_id))

    # ---- standing ------------------------------------------------------------------------------------

    def standing(self) -> NodeStanding:
        """Labels, taints, and whether new pods may come."""
        return self._standing.status()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have *listener* called whenever `standing` may say something else."""
        self._standing.on_change(listener)

    def stop(self) -> None:
        """The process is about to end: from now on the node is ``draining``."""
        self._stopping = self._standing.draining = True

    async def label(self, request: NodeLabel) -> NodeStanding:
        """Change labels; see `Standing.label`."""
        return await self._standing.label(request.set, request.remove)

    async def cordon(self, reason: str) -> NodeStanding:
        """Take no new pods; those that are here go on. Idempotent; survives restarts."""
        return await self._standing.cordon(reason)

    async def uncordon(self) -> NodeStanding:
        """Take new pods again. Idempotent.

        Raises:
            FailedPreconditionError: A drain is under way.
        """
        if self._standing.draining:
            raise FailedPreconditionError("The node is draining; wait until that is over.", state="draining")
        return await self._standing.uncordon()

    async def drain(self, *, timeout_s: float, delete: bool, reason: str, call: Call) -> DrainReport:
        """Cordon the node and stop all pods, those of the lowest priority first.

        Each pod gets its containers' grace, but no more than is left of *timeout_s*; what still runs then is
        killed. An event tells of each pod. A pod that cannot be stopped does not keep the others.

        Args:
            timeout_s: Seconds for all pods together.
            delete: Whether the pods are deleted as well.
            reason: For people.
            call: The command; each pod's events carry its id.

        Raises:
            FailedPreconditionError: A drain is under way already.
        """
        if self._standing.draining:
            raise FailedPreconditionError("The node is draining already.", state="draining")
        await self._standing.cordon(reason)
        self._standing.draining = True
        try:
            return await _Drain(
                self._pods, self._standing, timeout_s=timeout_s, delete=delete, call=call
            ).run()
        finally:
            self._standing.draining = self._stopping


class _Drain:
    """One drain from its begin to its end."""

    def __init__(
        self, pods: PodService, standing: Standing, *, timeout_s: float, delete: bool, call: Call
    ) -> None:
        self._pods = pods
        self._standing = standing
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._delete = delete
        self._call = call
        self._node = standing.status().node
        self._outcomes: dict[str, str] = {}
        self._total = 0

    async def run(self) -> DrainReport:
        """Stop the pods, one priority after the other."""
        todo = sorted(
            (r for r in self._pods.records if self._delete or r.state not in _NOTHING_RUNS),
            key=lambda record: record.spec.priority,
        )
        self._total = len(todo)
        await self._tell(None, None)
        for _, group in itertools.groupby(todo, key=lambda record: record.spec.priority):
            waiting = list(group)
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(PODS_AT_ONCE, len(waiting))):
                    workers.create_task(self._work(waiting))
        report = DrainReport(
            node=self._node,
            stopped=self._with("graceful", "absent"),
            forced=self._with("forced"),
            failed=self._with("failed"),
        )
        await self._standing.announce(EventKind.NODE_DRAINED, report.model_dump(mode="json"))
        return report

    def _with(self, *outcomes: str) -> tuple[str, ...]:
        return tuple(sorted(pod for pod, outcome in self._outcomes.items() if outcome in outcomes))

    async def _work(self, waiting: list[PodRecord]) -> None:
        while waiting:
            record = waiting.pop()
            with logs.about(pod_id=record.pod_id):
                self._outcomes[record.pod_id] = outcome = await self._stop(record)
            await self._tell(record.pod_id, outcome)

    async def _stop(self, record: PodRecord) -> str:
        left_s = max(0.0, self._deadline - asyncio.get_running_loop().time())
        grace_s = min(left_s, max([c.spec.stop_timeout_s for c in record.containers], default=left_s))
        try:
            stopped = await self._pods.stop(record.pod_id, grace_s, self._call)
            if self._delete:
                await self._pods.delete(record.pod_id, False, self._call)
        except VcnodeError as exc:
            log.warning("Pod %s cannot be drained: %s", record.pod_id, exc.message)
            return "failed"
        return stopped.outcome

    async def _tell(self, pod_id: str | None, outcome: str | None) -> None:
        progress = DrainProgress(
            node=self._node, pod_id=pod_id, outcome=outcome, done=len(self._outcomes), total=self._total
        )
        await self._standing.announce(EventKind.NODE_DRAINING, progress.model_dump(mode="json"))
